"The package is what the notebooks export, and the notebooks are clean."
import filecmp
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_export_and_clean_change_nothing(tmp_path):
    tree = tmp_path/'tree'
    shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(
        '.git', '.venv', '_proc', '_docs', 'runs', 'data', '__pycache__', '.pytest_cache', '.hypothesis', '*.egg-info'))
    binaries = Path(sys.executable).parent
    for command in ('nbdev-export', 'nbdev-clean'):
        subprocess.run([binaries/command], cwd=tree, check=True, capture_output=True)
    for folder in ('foldbook', 'nbs'):
        names = [p.name for p in (tree/folder).iterdir() if p.suffix in ('.py', '.ipynb')]
        _, mismatch, errors = filecmp.cmpfiles(ROOT/folder, tree/folder, names, shallow=False)
        assert not mismatch and not errors, f'run nbdev-export and nbdev-clean: {mismatch + errors} differ'
        assert {p.name for p in (ROOT/folder).iterdir() if p.suffix in ('.py', '.ipynb')} == set(names)
