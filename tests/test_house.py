"The rules of the house: each is read off the tree."
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {p.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.'): p
           for p in (ROOT/'foldbook').rglob('*.py') if p.name != '_modidx.py'}
CHAPTERS = sorted((ROOT/'nbs').glob('*.ipynb'))


def code_cells(path):
    "Sources of the code cells of a chapter."
    return [''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']


def imports(path, package):
    "Pairs (module of foldbook, name) that a file imports; the name is '' for a whole module."
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((a.name, '') for a in node.names if a.name.split('.')[0] == 'foldbook')
        if isinstance(node, ast.ImportFrom):
            base = package.rsplit('.', node.level)[0] if node.level else ''
            module = '.'.join(filter(None, (base, node.module)))
            if module.split('.')[0] != 'foldbook': continue
            for a in node.names:
                whole = f'{module}.{a.name}'
                yield (whole, '') if whole in MODULES else (module, a.name)


def test_no_private_name_crosses_a_module():
    wrong = [f'{name}: {found} of {module}' for name, path in MODULES.items() for module, found in imports(path, name)
             if found.startswith('_') and not found.startswith('__')]
    assert not wrong


def test_imports_point_to_earlier_chapters():
    place = {}
    for k, path in enumerate(CHAPTERS):
        for cell in code_cells(path):
            if found := re.search(r'^#\|\s*default_exp\s+(\S+)', cell, re.M): place[f'foldbook.{found[1]}'] = k
    wrong = [f'{name} imports {module}' for name, path in MODULES.items() if name in place
             for module, _ in imports(path, name) if place.get(module, -1) > place[name]]
    assert not wrong


def test_no_line_is_longer_than_120_characters():
    without_all = lambda text: re.sub(r'^__all__ = \[.*?\]$', '', text, flags=re.M | re.S)  # nbdev fills it
    texts = {p.name: without_all(p.read_text()) for p in MODULES.values()}
    texts |= {p.name: '\n'.join(code_cells(p)) for p in CHAPTERS}
    wrong = [f'{name}: {line[:60]}' for name, text in texts.items() for line in text.split('\n') if len(line) > 120]
    assert not wrong


@pytest.mark.parametrize('words, homes', [(r'\bpl\.Trainer\(', {'training'}),
                                          (r'\bPopen\(|ProcessPool|multiprocessing', set()),
                                          (r'\bLocalCluster\(', {'workers'}), (r'\bos\.replace\(', {'base'}),
                                          (r'\bimport pickle|pickle\.load|allow_pickle=True', set())])
def test_each_tool_has_one_home(words, homes):
    found = {p.stem for p in MODULES.values() if re.search(words, '\n'.join(
        line.split('#')[0] for line in p.read_text().split('\n')))}
    assert found <= homes, f'{words} belongs to {homes or "a library"}; found in {found}'


def test_only_the_command_line_prints():
    wrong = []
    for name, path in MODULES.items():
        if name.startswith('foldbook.cli'): continue
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        if any(isinstance(n.func, ast.Name) and n.func.id == 'print' for n in calls): wrong.append(name)
    assert not wrong


@pytest.mark.parametrize('module, heavy', [('foldbook', {'numpy', 'torch', 'mdtraj'}),
                                           ('foldbook.zq', {'torch', 'mdtraj', 'openmm', 'pandas', 'sklearn',
                                                            'matplotlib'}),
                                           ('foldbook.distill', {'openmm', 'mdtraj'}),
                                           ('foldbook.transfer', {'openmm', 'mdtraj'})])
def test_a_module_loads_no_more_than_it_needs(module, heavy):
    code = f'import sys, {module}; print(*sys.modules)'
    loaded = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True,
                            cwd=ROOT).stdout.split()
    assert not heavy & set(loaded)


def test_the_face_of_the_package():
    import foldbook as fb
    for name in fb.__all__: assert getattr(fb, name).__doc__, name
    with pytest.raises(AttributeError, match="foldbook has no 'profiel'"): getattr(fb, "profiel")


def test_contributing_maps_every_module():
    named = set(re.findall(r'`(foldbook\.[a-z0-9_.]+)`', (ROOT/'CONTRIBUTING.md').read_text()))
    modules = {n.removesuffix('.__init__') for n in MODULES} - {'foldbook'}
    assert named == modules, f'missing: {sorted(modules - named)}; not there: {sorted(named - modules)}'
