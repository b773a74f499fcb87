"""quickstart.ipynb: committed without outputs; from top to bottom in a copy of the repository (slow)."""
import csv
import json
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATH = ROOT / 'quickstart.ipynb'


def code_cells():
    return [cell for cell in json.loads(PATH.read_text())['cells'] if cell['cell_type'] == 'code']


def test_six_clean_cells_of_commands_that_exist():
    cells = code_cells()
    assert len(cells) == 6
    for cell in cells:
        assert cell['outputs'] == [] and cell['execution_count'] is None
    text = '\n'.join(''.join(cell['source']) for cell in cells)
    commands = re.findall(r'(?m)^!python (\S+)', text) + re.findall(r"'(\S+\.py) config/", text)
    assert len(commands) == 9
    for command in commands:
        assert command in ('{train}', '-m') or (ROOT / command).is_file(), command
    for config in re.findall(r'config/\w+\.py', text):
        assert (ROOT / config).is_file(), config


@pytest.mark.slow
def test_runs_from_top_to_bottom(tmp_path):
    nbclient = pytest.importorskip('nbclient')
    nbformat = pytest.importorskip('nbformat')
    pytest.importorskip('ipykernel')
    pytest.importorskip('matplotlib')
    clone = tmp_path / 'clone'
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns('.git', 'out', 'data', '*_cache', '__pycache__', 'my'))
    notebook = nbformat.read(clone / PATH.name, as_version=4)
    nbclient.NotebookClient(notebook, timeout=1800, kernel_name='python3',
                            resources=dict(metadata=dict(path=str(clone)))).execute()
    said = ''.join(output.get('text', '') for cell in notebook.cells if cell.cell_type == 'code'
                   for output in cell.outputs)
    assert 'error:' not in said and 'Traceback' not in said, said[-3000:]
    pictures = [cell for cell in notebook.cells if cell.cell_type == 'code'
                and any('image/png' in output.get('data', {}) for output in cell.outputs)]
    assert len(pictures) == 4
    rows = {name: list(csv.DictReader((clone / f'out/{name}/log.csv').open())) for name in ('quickstart', 'ball')}
    assert max(float(row['AP50'] or 0) for row in rows['quickstart']) > 0.2, 'it learns'
    assert rows['ball'][-1]['step'] == '80' and 'step 80/80' in said, 'the resumed run ended'
    assert 'circle' in said and re.search(r'ball_detect: 1 images, [1-9] objects', said)
