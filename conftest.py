"Make nbval read notebooks the way nbdev writes them."
import re

_no_run = re.compile(r'^#\|\s*(eval:\s*false|slow|notest)\b', re.M)


def pytest_collection_modifyitems(items):
    for item in items:
        if (cell := getattr(item, 'cell', None)) is None: continue
        if cell.outputs and cell.execution_count is None: cell.execution_count = 1  # nbdev-clean took it
        if _no_run.search(cell.source): item.options['skip'] = True
