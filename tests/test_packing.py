"Packing and unpacking."
import pytest
from hypothesis import given, settings, strategies as st

import foldbook.packing as fp
from test_frames import trajectory


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 40), st.integers(10, 50), st.integers(0, 1000))
def test_packing_loses_nothing(tmp_path_factory, n_frames, n_beads, seed):
    d = tmp_path_factory.mktemp('pack')
    t = trajectory(n_frames, n_beads, seed)
    t.save_xtc(str(d/'a.xtc'))
    t[0].save_pdb(str(d/'top.pdb'))
    fp.unpack_trajectory(fp.pack_trajectory(d/'a.xtc', d/'top.pdb', d/'a.npy.xz'), d/'b.xtc', 6.0)
    assert (d/'a.xtc').read_bytes() == (d/'b.xtc').read_bytes()


def test_packing_refuses_far_positions(tmp_path):
    t = trajectory(2, 12)
    t.xyz += 40
    t.save_xtc(str(tmp_path/'a.xtc'))
    t[0].save_pdb(str(tmp_path/'top.pdb'))
    with pytest.raises(ValueError, match='centre'):
        fp.pack_trajectory(tmp_path/'a.xtc', tmp_path/'top.pdb', tmp_path/'a.npy.xz')
