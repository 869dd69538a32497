"Fixtures that several test files share."
import pytest

TURN = [(-1.0, -0.82)]*9 + [(1.05, 0.7)]*3 + [(-1.0, -0.82)]*9  # helix, turn, helix; radians


@pytest.fixture(scope='session')
def hth(tmp_path_factory):
    "PDB file of a chain of 21 alanines: a helix, a turn, a helix."
    from foldbook.molecules import build_chain
    path = tmp_path_factory.mktemp('pdb')/'hth.pdb'
    build_chain('A'*21, TURN).save_pdb(str(path))
    return path


@pytest.fixture(scope='session')
def model(hth):
    "The structure-based model of `hth`."
    from foldbook.go import GoModel
    return GoModel.from_pdb(hth)
