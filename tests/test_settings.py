"settings.ini and pyproject.toml say the same."
import shutil
import tomllib
from pathlib import Path

from nbdev.migrate import nbdev_migrate_config

ROOT = Path(__file__).parents[1]


def test_settings_ini_migrates_to_our_pyproject(tmp_path):
    shutil.copy(ROOT/'settings.ini', tmp_path)
    (tmp_path/'foldbook').mkdir()
    nbdev_migrate_config(tmp_path)
    old = tomllib.loads((tmp_path/'pyproject.toml').read_text())
    new = tomllib.loads((ROOT/'pyproject.toml').read_text())
    extras = new['project']['optional-dependencies']
    assert extras.pop('docs') == ['quarto-cli']  # settings.ini knows one extra only
    assert set(extras.pop('export')) <= set(extras['dev'])  # onnx and its runtime, of chapter 48
    # another program's networks, of chapter 50; not needed by any test
    assert extras.pop('torchmdnet') == ['torchmd-net>=3.1']
    assert old['project'] == new['project']
    assert old['tool']['nbdev'].items() <= new['tool']['nbdev'].items()


def test_versions_agree():
    import configparser

    import foldbook
    ini = configparser.ConfigParser()
    ini.read(ROOT/'settings.ini')
    assert ini['DEFAULT']['version'] == foldbook.__version__
    assert f'version: {foldbook.__version__}' in (ROOT/'CITATION.cff').read_text()


def test_every_dependency_is_constrained():
    import re
    project = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']
    pinned = {re.split('==', line)[0].lower().replace('_', '-')
              for line in (ROOT/'constraints.txt').read_text().split()}
    wanted = project['dependencies'] + project['optional-dependencies']['dev']
    names = {re.split('[<>=]', w)[0].lower().replace('_', '-') for w in wanted}
    assert names <= pinned, f'add to constraints.txt: {sorted(names - pinned)}'
