"The pages of the site, processed as Quarto would get them."
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROCESS = '''
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
refresh_quarto_yml(); proc_nbs(force=True, n_workers=0)
'''


def sidebar(contents):
    "Every page named in the sidebar, in order."
    for entry in contents:
        if isinstance(entry, dict): yield from sidebar(entry['contents'])
        else: yield entry


PAGES = list(sidebar(yaml.safe_load((ROOT/'_quarto.yml').read_text())['website']['sidebar']['contents']))


def test_sidebar_lists_every_chapter():
    assert sorted(PAGES) == sorted(p.name for p in (ROOT/'nbs').glob('*.ipynb'))


@pytest.fixture(scope='module')
def pages(tmp_path_factory):
    tree = tmp_path_factory.mktemp('site')/'foldbook'
    shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(
        '.git', '.venv', '_proc', '_docs', 'runs', '__pycache__', '.pytest_cache', '.hypothesis', '*.egg-info'))
    subprocess.run([sys.executable, '-c', PROCESS], cwd=tree, check=True, capture_output=True, timeout=900)
    return {p.name: json.loads(p.read_text()) for p in (tree/'_proc').glob('*.ipynb')}


@pytest.mark.parametrize('name', PAGES)
def test_page_has_a_title_and_no_broken_link(name, pages):
    cells = pages[name]['cells']
    text = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] in ('raw', 'markdown'))
    front = next(yaml.safe_load(''.join(c['source']).strip().strip('-')) for c in cells if c['cell_type'] == 'raw')
    assert {'title', 'description', 'output-file'} <= set(front)
    local = re.findall(r'\]\((?!https?:|#|data:|attachment:)([^)#\s]+)', text)
    missing = [link for link in local if not any((ROOT/'nbs'/link).with_suffix(s).exists()
                                                 for s in (Path(link).suffix, '.ipynb'))]
    assert not missing, f'{name} links to {missing}'


@pytest.mark.parametrize('name', [p for p in PAGES if p[0].isdigit()])
def test_every_public_name_is_shown(name, pages):
    source = json.loads((ROOT/'nbs'/name).read_text())
    code = '\n'.join(''.join(c['source']) for c in source['cells'] if re.search(r'^#\|\s*exports?\b',
                                                                                ''.join(c['source']), re.M))
    public = set(re.findall(r'^(?:def|class) ([A-Za-z]\w*)', code, re.M))
    page = json.dumps(pages[name])
    assert all(n in page for n in public)
    assert 'Traceback' not in page
