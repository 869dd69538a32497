"Force matching: a known mean force, training that is killed and resumed, several chains, two processes, data sets."
import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cg import KT, NAMES, TABLE, chain_frames, mixed, zigzag

import foldbook.cg as cg
import foldbook.matching as matching
from foldbook.cg import ForceData, Potential, Prior, SchNet
from foldbook.matching import MatchOptions, match, model_forces, training_data


def spring_data(n=6000, seed=0, noise=1.):
    "Three beads on three known springs; forces with noise."
    rng = np.random.default_rng(seed)
    x = np.zeros((n, 3, 3)) + [[0, 0, 0], [0.4, 0, 0], [0.2, 0.35, 0]] + rng.normal(0, 0.03, (n, 3, 3))
    force = np.zeros_like(x)
    for (i, j), r0 in {(0, 1): 0.4, (1, 2): 0.42, (0, 2): 0.38}.items():
        d = x[:, i] - x[:, j]
        r = np.linalg.norm(d, axis=1, keepdims=True)
        g = -200*(r - r0)*d/r
        force[:, i] += g
        force[:, j] -= g
    return ForceData(('GLY', 'ALA', 'TRP'), x.astype(np.float32),
                     (force + rng.normal(0, noise, x.shape)).astype(np.float32)), force


def test_a_known_mean_force_is_recovered():
    d, mean = spring_data(3500, noise=3.)
    torch.manual_seed(0)
    p = Potential(None, cg.table_of(d.names), SchNet(3, 16))
    match(p, [d[:2500]], [d[2500:3000]], MatchOptions(max_epochs=8, learning_rate=1e-2, batch_size=64, average=0.98),
          progress=False)
    f, (test, known) = model_forces(p, d[3000:]), (d[3000:], mean[3000:])
    parts = matching.split_loss(f, known, test.forces)
    assert 1 - parts.error/(known**2).mean() > 0.9
    assert parts.noise < parts.total < 1.4*parts.noise
    assert matching.loss_table(test, dict(net=p), floor=9.).loss['net'] == pytest.approx(parts.total, rel=1e-5)


def fresh(seed=0):
    "A small network for the three beads on springs."
    torch.manual_seed(seed)
    return Potential(None, dict(ALA=1, GLY=2, TRP=3), SchNet(3, 8))


SHORT = MatchOptions(max_epochs=5, learning_rate=5e-3, batch_size=64, plateau=0)

KILLED = '''
import sys, time
sys.path.insert(0, sys.argv[1])
from test_matching import SHORT, SchNet, fresh, match, spring_data
class Slow(SchNet): # time enough to be killed
    def forward(self, *a):
        time.sleep(0.05)
        return super().forward(*a)
p, (d, _) = fresh(), spring_data(600)
p.network.__class__ = Slow
match(p, [d[:500]], [d[500:]], SHORT, sys.argv[2], progress=False)
'''


def test_training_that_was_killed_ends_with_the_same_weights(tmp_path):
    d, _ = spring_data(600)
    whole = match(fresh(), [d[:500]], [d[500:]], SHORT, progress=False)
    (script := tmp_path/'go.py').write_text(KILLED)
    child = subprocess.Popen([sys.executable, str(script), str(Path(__file__).parent), str(tmp_path)])
    while not (tmp_path/'match.ckpt').exists():
        assert child.poll() is None, 'the training ended before it was killed'
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    again = match(fresh(), [d[:500]], [d[500:]], SHORT, tmp_path, progress=False)
    assert again.history == whole.history and [h['epoch'] for h in again.history] == list(range(5))
    for a, b in zip(again.network.parameters(), whole.network.parameters(), strict=True): assert torch.equal(a, b)
    with pytest.raises(ValueError, match='another training or other data'):
        match(fresh(), [d[:400]], [d[500:]], SHORT, tmp_path, progress=False)


def test_best_weights_are_kept():
    d, _ = spring_data(600)
    p = match(fresh(), [d[:500]], [d[500:]], MatchOptions(max_epochs=6, learning_rate=0.05, batch_size=100, average=0.),
              progress=False)
    loss = float(((model_forces(p, d[500:]) - d[500:].forces)**2).mean())
    assert loss == pytest.approx(min(h['loss'] for h in p.history), rel=1e-5)


def test_one_network_for_two_chains():
    "The validation loss is the mean over all components of both chains."
    d, _ = spring_data(300)
    longer = ForceData(('ALA', 'GLY', 'TRP', 'ALA'), zigzag(4, 200, dtype=torch.float32).numpy(),
                       np.random.default_rng(0).normal(0, 5, (200, 4, 3)).astype(np.float32))
    p = replace_prior(fresh(), Prior({'*': (10., 0.4)}))
    held_out = [d[:50], longer[:70]]
    match(p, [d, longer], held_out, MatchOptions(max_epochs=2), progress=False)
    squares = [((model_forces(p, c) - c.forces)**2).sum() for c in held_out]
    assert len(p.history) == 2
    assert min(h['loss'] for h in p.history) == pytest.approx(sum(squares)/(3*(50*3 + 70*4)), rel=1e-4)


def replace_prior(p, prior): return Potential(prior, p.table, p.network)


def test_the_bad_chain_is_named():
    d, prior = chain_frames()
    bad = replace(d, forces=d.forces.copy())
    bad.forces[3, 1, 0] = np.nan
    with pytest.raises(ValueError, match=r'chain 1 of 2: frame 3, bead 1 \(ASP\)'):
        match(Potential(prior, TABLE, SchNet(22, 8)), [d, bad], [d], progress=False)
    with pytest.raises(ValueError, match='batch_size=0'): MatchOptions(batch_size=0)


@pytest.mark.parametrize('weight', [0., 1., None])
def test_noised_frames_keep_the_force_of_the_smoothed_density(weight):
    "One bead in a harmonic well: smoothing adds sigma^2 to its variance, and the force follows."
    rng, k, sigma = np.random.default_rng(0), 50., 0.2
    x = rng.normal(0, math.sqrt(KT/k), (200_000, 1, 3))
    d = matching.noised(ForceData(('ALA',), x, -k*x + rng.normal(0, 5, x.shape)), sigma, 350., weight, seed=1)
    slope = (d.forces*d.xyz).sum()/(d.xyz**2).sum()
    assert slope == pytest.approx(-KT/(KT/k + sigma**2), rel=0.03)


DDP = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from test_matching import MatchOptions, fresh, match, spring_data
if __name__ == '__main__':
    (d, _), p = spring_data(576), fresh()
    match(p, [d[:512]], [d[512:]], MatchOptions(max_epochs=2, batch_size=64, average=0.9, devices=int(sys.argv[2])),
          progress=False)
    losses = [h['loss'] for h in p.history]
    if os.environ.get('LOCAL_RANK', '0') == '0': open(sys.argv[3], 'w').write(json.dumps(losses))
"""


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    "Lightning shares each batch among devices; halves of equal size average to the whole."
    (script := tmp_path/'two.py').write_text(DDP)
    for n in '12':
        subprocess.run([sys.executable, script, str(Path(__file__).parent), n, tmp_path/n], check=True, timeout=300,
                       cwd=tmp_path)
    losses = [json.loads((tmp_path/n).read_text()) for n in '12']
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize('model', ['graph-network', 'tensornet'])
def test_torchmdnet_behind_the_same_call(model):
    pytest.importorskip('torchmdnet.models.model') # an optional program
    p, chains, xs, x = mixed(False, torch.float32)
    p.network = matching.torchmdnet(model, 16, 2)
    e, f = p.forces(x, p.system(*chains))
    e1, f1 = p.forces(xs[1], p.system(NAMES))
    torch.testing.assert_close(f[1], f1[0], rtol=1e-3, atol=1e-2)
    assert torch.isfinite(e).all()
    assert float(p.network(p.system(NAMES).types, xs[1], torch.ones(1, 10, dtype=bool)).detach().abs()) > 0


# --- data sets ----------------------------------------------------------------------------------------------------
def test_training_data_from_npz(tmp_path):
    x, f = np.random.default_rng(0).normal(size=(2, 6, 10, 3))
    np.savez(path := tmp_path/'a.npz', xyz=x, forces=f, names=NAMES)
    d, = training_data(path, every=2)
    assert d.names == tuple(NAMES) and d.xyz.shape == (3, 10, 3)
    np.testing.assert_allclose(d.forces, f[::2], rtol=1e-6)
    np.savez(path, xyz=x)
    with pytest.raises(ValueError, match='no array forces, names'): training_data(path)
    with pytest.raises(FileNotFoundError, match='nothing.npz'): training_data(tmp_path/'nothing.npz')


@pytest.mark.parametrize('protein', matching.PROTEINS)
def test_every_protein_has_its_sets(protein, monkeypatch):
    from foldbook.data import info
    files = {f.name for f in info(f'majewski_{protein}_ca').files}
    assert files == {f'{protein}_ca_{k}.npy' for k in ('coords', 'forces', 'deltaforces', 'embeddings')}
    assert info(f'majewski_{protein}_cg').trajectory_pattern == '*.xtc' and info(f'majewski_{protein}')


@pytest.mark.filterwarnings('ignore::foldbook.data.LicenceNotice')
def test_published_arrays_become_training_data(monkeypatch, tmp_path):
    "Files in the authors' layout and units, as a user would have them after a download."
    import foldbook.sources as fs
    from foldbook.data import info
    rng, n = np.random.default_rng(0), 10
    x, f = rng.normal(size=(2, 8, n, 3)).astype(np.float32)
    types = cg.bead_types('TYR TYR ASP PRO GLU THR GLY THR TRP TYR'.split(), TABLE)
    for kind, a in dict(coords=x/0.1, forces=f/41.84, deltaforces=f/83.68, embeddings=types).items():
        np.save(tmp_path/f'chignolin_ca_{kind}.npy', a)
    monkeypatch.setattr(fs, 'fetch', lambda d, *a: replace(d, directory=tmp_path))
    d, = training_data('chignolin', every=3)
    assert d.names[:3] == ('TYR', 'TYR', 'ASP')
    np.testing.assert_allclose(d.xyz, x[::3], rtol=1e-5)
    np.testing.assert_allclose(d.forces, f[::3], rtol=1e-4)
    assert info('majewski_chignolin_ca').units == 'angstrom, kcal/mol/angstrom'


def test_sets_without_forces_are_refused():
    with pytest.raises(ValueError, match='has no forces'): training_data('cln025_implicit')


@pytest.mark.parametrize('name', ['cg', 'cgsim'])
def test_stored_results_were_made_by_the_chapter(name):
    path = Path(cg.__file__).parents[1]/'data'/f'{name}.json'
    chapter = dict(cg='nbs/50a_force_matching.ipynb', cgsim='nbs/59a_cg_comparison.ipynb')[name]
    assert chapter in json.loads(path.read_text())['made_by'] and path.stat().st_size < 30_000
