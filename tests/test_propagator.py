"The propagator and its motions beyond their chapters: two chains, weights, a training that is killed, wrong files."
import lzma
import signal
import subprocess
import sys
from pathlib import Path

import mdtraj as md
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.base import clone

from foldbook.motions import Chain, Motion, beginnings, chain_of
from foldbook.propagation import bounds_of, jump, run
from foldbook.propagator import (Density, Propagator, PropagatorOptions, distance_rates, linear_start, load_propagator,
                                 pairs, seen, typical, typical_start)
from foldbook.tree import read_tree
from foldbook.rebuilding import reconstruction_error

DATA = Path(__file__).parents[1]/'data'


def torsion(x): # a motion of one angle; x: (F,)
    one = Chain(torch.tensor([0]), torch.tensor([0]), torch.tensor([0]), torch.arange(11)[None] == 1,
                torch.ones(1, dtype=torch.bool))
    return Motion(one, [torch.as_tensor(x).float()[:, None]])


def drifting(n=400): # an angle that forgets slowly
    g, x = torch.Generator().manual_seed(0), torch.zeros(n)
    for t in range(1, n): x[t] = 0.9*x[t-1] + 0.3*torch.randn(1, generator=g)
    return {'one': torsion(x)}


@pytest.fixture(scope='module')
def bombyxin(tmp_path_factory): # two chains that tumble and move against each other
    path = tmp_path_factory.mktemp('1bom')/'1bom.pdb'
    path.write_bytes(lzma.open(DATA/'1bom.pdb.xz').read())
    tree = read_tree(path).measured()
    chain, g = chain_of(tree), torch.Generator().manual_seed(0)
    x0 = chain.encode(tree.positions[None])
    walk = lambda: torch.cumsum(torch.randn(60, x0.shape[1], generator=g), 0)
    return Motion(chain, [x0 + 0.05*walk()*0.3 for _ in range(2)])


@pytest.fixture(scope='module')
def trained(bombyxin):
    return Propagator(width=16, layers=1, steps=2, batch_size=8).fit({'1bom': bombyxin}, progress=False)


def test_two_chains_go_to_columns_and_back(bombyxin):
    x, chain = bombyxin.series[0], bombyxin.code
    r = chain.decode(x)
    assert float(chain.minus(chain.encode(r), x).abs().max()) < 1e-4
    Q = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    turned = r @ (Q*torch.linalg.det(Q)) # a rotation, no mirror image
    assert float(chain.minus(chain.encode(turned + 3.0), x).abs().max()) < 1e-4


def test_structure_is_rebuilt_whole(bombyxin):
    tree, chain = bombyxin.tree, bombyxin.code
    error = reconstruction_error(tree, tree.positions[None], chain.decode(chain.encode(tree.positions[None])).numpy())
    assert error['backbone'][0] < 1e-3 and error['heavy'][0] < 0.03 # nm


def test_anchors_are_whole_residues_in_the_middle(bombyxin):
    tree = bombyxin.tree
    for atoms, segment in zip(bombyxin.code.anchors.T.tolist(), tree.segments):
        assert [tree.names[a] for a in atoms] == ['N', 'CA', 'C'] and len(set(tree.residue[atoms])) == 1
        assert 0.3 < list(segment).index(atoms[0])/len(segment) < 0.7


def test_loose_end_moves_no_chain(bombyxin):
    "A turn of the first residue's psi moves what is before it, seen from the middle, and not the other chain."
    x = bombyxin.series[0][:1]
    moved = x.clone()
    moved[:, 0] += 1.0
    a, b = (bombyxin.code.decode(v)[0] for v in (x, moved))
    second = bombyxin.tree.segment[bombyxin.tree.residue] == 1
    assert float((a - b)[second].abs().max()) < 1e-9


def test_two_chain_run_stays_whole_and_is_reproducible(bombyxin, trained, tmp_path):
    bounds, start = bounds_of(bombyxin), bombyxin.series[0][:2]
    a = run(trained, '1bom', start, 6, bounds=bounds, tries=2, seed=3, piece=3, progress=False, directory=tmp_path)
    b = run(trained, '1bom', start, 6, bounds=bounds, tries=2, seed=3, piece=3, progress=False)
    assert all(torch.equal(u, v) for u, v in zip(a.motion.series, b.motion.series))
    t = md.load(str(tmp_path/'1bom-1.xtc'), top=str(tmp_path/'1bom.pdb'))
    assert t.topology.n_chains == 2 and t.n_atoms == len(bombyxin.tree)
    bonds = np.array([(i.index, j.index) for i, j in md.load(str(tmp_path/'1bom.pdb')).topology.bonds
                      if 'SG' not in (i.name, j.name)])
    assert md.compute_distances(t, bonds).max() < 0.25


def test_weights_of_distances_do_not_move_the_minimum(bombyxin):
    """Their gradient at the mean velocity is zero for targets that scatter about it; that of a distance to the end
    point is not."""
    x, L = bombyxin.series[0][:1], 0.05
    g = torch.Generator().manual_seed(0)
    half = L*torch.randn(8, x.shape[1], generator=g)
    targets = torch.cat([half, -half]) # mean zero
    v = torch.zeros_like(x, requires_grad=True)
    distance_rates(bombyxin.code, x.expand(16, -1), v - targets).square().sum().backward()
    rates = v.grad.clone()
    def far(y):
        r = bombyxin.code.decode(y)[:, ::20]
        return torch.cdist(r, r)
    v.grad = None
    (far(x + v) - far(x + targets)).square().sum().backward()
    scale = float(distance_rates(bombyxin.code, x.expand(16, -1), targets).square().sum())
    assert float(rates.abs().max())/scale < 1e-4 < float(v.grad.abs().max())/scale


def test_attention_knows_segments_apart(bombyxin):
    torch.manual_seed(0)
    d, s = Density(16, 1), linear_start(bombyxin, bombyxin)
    with torch.no_grad():
        d.head.weight.normal_(std=0.3)
        d.trunk.attend[0].apart.fill_(-1e9)
    x = bombyxin.series[0][:2]
    other = x.clone()
    second = bombyxin.code.segments[bombyxin.code.used//11] == 1
    other[:, second] += 0.3
    first = bombyxin.code.segments == 0
    read = lambda v: d.head(d.trunk(seen(bombyxin.code, s, v), bombyxin.code, torch.ones(2, 1)))[:, first]
    assert torch.allclose(read(x), read(other), atol=1e-6) # wholly apart: no message
    with torch.no_grad(): d.trunk.attend[0].apart.fill_(0)
    assert not torch.allclose(read(x), read(other), atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(2, 30), st.integers(2, 30))
def test_pairs_never_cross_trajectories(lag, n, m):
    series = [torch.arange(n)[:, None] + 0., 1000 + torch.arange(m)[:, None] + 0.]
    if max(n, m) <= lag: return
    x, y = pairs(series, lag)
    assert torch.equal(y - x, torch.full_like(x, lag)) and len(x) == max(0, n - lag) + max(0, m - lag)
    assert torch.equal(torch.cat(series)[beginnings(series, lag)], x)


def test_ridge_keeps_each_column_for_itself():
    "Two hundred columns and few frames: the line must not be worse than every column by itself."
    g, K = torch.Generator().manual_seed(0), 200
    x = torch.zeros(400, K)
    for t in range(1, 400): x[t] = 0.9*x[t-1] + 0.05*torch.randn(K, generator=g)
    chain = Chain(torch.zeros(20, dtype=torch.long), torch.arange(20), torch.zeros(20, dtype=torch.long),
                  torch.arange(11).expand(20, 11) < 10, torch.ones(K, dtype=torch.bool))
    m = Motion(chain, [x])
    s = linear_start(m.cut(0, 0.5), m.cut(0.5, 0.75))
    a, b = pairs(m.cut(0.75, 1).series, 1)
    assert float((b - s.predict(chain, a)).square().mean()) < 1.15*0.05**2
    assert float(s.step.diagonal().mean()) > 0.8


def test_typical_start_of_unseen_sequence():
    g = torch.Generator().manual_seed(0)
    chain = lambda kinds: Chain(torch.tensor(kinds), torch.arange(len(kinds)),
                                torch.zeros(len(kinds), dtype=torch.long),
                                (torch.arange(11) < 2).expand(len(kinds), 11),
                                torch.ones(2*len(kinds), dtype=torch.bool))
    a, b = chain([0, 5]), chain([5, 0, 0])
    noise = [torch.randn(5000, 2, generator=g) for _ in range(2)]
    m = Motion(a, [torch.cat([1 + 0.1*noise[0], -1 + 0.3*noise[1]], 1)])
    s = typical_start(typical([m], 1), b)
    assert torch.allclose(s.mean, torch.tensor([-1, -1, 1, 1, 1, 1.]), atol=0.02)
    assert torch.allclose(s.width, torch.tensor([.3, .3, .1, .1, .1, .1]), atol=0.02)
    assert float(s.step.abs().max()) < 0.05
    with pytest.raises(ValueError, match='residue 2, ARG'): typical_start(typical([m], 1), chain([0, 1]))


def test_bounds_draw_again_and_report(bombyxin):
    class Wild: # jumps far away, and near every other time
        motions = {'1bom': bombyxin}
        n = 0
        def sample(self, name, x, lag, g):
            self.n += 1
            return x + (2.0 if self.n == 1 else 1e-3)
    y, again, out = jump(Wild(), '1bom', bombyxin.series[0][:3], 1, None, bounds_of(bombyxin), 5)
    assert again == 3 and out == 0 and float((y - bombyxin.series[0][:3]).abs().max()) < 0.01


def test_a_flow_has_two_answers_where_a_gaussian_has_one():
    "From everywhere the angle goes to -1.2 or to 1.2: the best Gaussian is wide and puts a third in between."
    g = torch.Generator().manual_seed(0)
    truth = lambda n: 1.2*(2*torch.randint(2, (n,), generator=g) - 1) + 0.1*torch.randn(n, generator=g)
    p = Propagator(width=16, layers=1, steps=300, learning_rate=5e-3).fit({'one': torsion(truth(4000))}, progress=False)
    x = truth(2000)[:, None]
    gaussian, flow = (p.sample('one', x, generator=g, flow=f) for f in (False, True))
    between = lambda v: float((v.abs() < 0.6).double().mean())
    assert between(gaussian) > 0.3 and between(flow) < 0.1
    assert 0.35 < float((flow > 0).double().mean()) < 0.65


SMALL = dict(width=8, layers=1, steps=300, batch_size=16)
KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_propagator import SMALL, drifting
from foldbook.propagator import Flow, Propagator
forward, calls = Flow.forward, []
def dies(*args):
    calls.append(1)
    if len(calls) == 170: os.kill(os.getpid(), signal.SIGKILL) # in the second epoch of the flow
    return forward(*args)
Flow.forward = dies
Propagator(**SMALL).fit(drifting(), directory={directory!r}, progress=False)
"""


def test_a_training_that_was_killed_resumes_with_equal_numbers(tmp_path):
    code = KILLED.format(tests=str(Path(__file__).parent), directory=str(tmp_path))
    child = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert sorted(f.name for f in tmp_path.iterdir()) == ['density.ckpt', 'flow.ckpt']
    straight = Propagator(**SMALL).fit(drifting(), progress=False)
    resumed = Propagator(**SMALL).fit(drifting(), directory=tmp_path, progress=False)
    assert [r['held_out'] for r in straight.history['flow']] == [r['held_out'] for r in resumed.history['flow']]
    for part in ('density', 'flow'):
        a, b = (getattr(p, part).state_dict() for p in (straight, resumed))
        assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(ValueError, match='belongs to another training or other data'):
        Propagator(**SMALL | dict(seed=1)).fit(drifting(), directory=tmp_path, progress=False)


def test_training_twice_gives_the_same(bombyxin, trained):
    again = clone(trained).fit({'1bom': bombyxin}, progress=False)
    assert again.get_params() == trained.get_params()
    assert all(torch.equal(u, v) for u, v in zip(again.flow.state_dict().values(), trained.flow.state_dict().values()))


def test_saved_and_loaded(tmp_path, bombyxin, trained):
    directory = trained.save(tmp_path/'model')
    x = bombyxin.series[0][:2]
    one, two = (v.sample('1bom', x, generator=torch.Generator().manual_seed(0))
                for v in (trained, load_propagator(directory)))
    assert torch.allclose(one, two, atol=1e-6)
    assert {f.suffix for f in directory.iterdir()} == {'.pdb', '.json', '.safetensors'}
    (directory/'propagator.json').unlink()
    with pytest.raises(FileNotFoundError, match='holds no propagator'): load_propagator(directory)
    with pytest.raises(ValueError, match='one: has no structure'):
        Propagator(**SMALL | dict(steps=1)).fit(drifting(), progress=False).save(tmp_path/'toy')


@pytest.mark.parametrize('options, word', [(dict(lags=()), 'lags'), (dict(lags=(0,)), 'lags'), (dict(start='x'), 'own'),
                                           (dict(width=30), 'width'), (dict(steps=0), 'steps'),
                                           (dict(heads=0), 'heads')])
def test_options_that_make_no_sense(options, word):
    with pytest.raises(ValueError, match=word): PropagatorOptions(**options)


def test_parameters_are_those_of_scikit_learn():
    p = Propagator(width=16, lags=[1, 5])
    assert p.get_params()['lags'] == (1, 5) and clone(p).get_params() == p.get_params()
    assert p.set_params(width=24).options.width == 24
    with pytest.raises(ValueError, match='width=30'): p.set_params(width=30)
    with pytest.raises(TypeError): Propagator(widht=16)


# --- the mixture --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('jump', ['mixture', 'flow'])
def test_both_kinds_of_jump_are_saved_and_loaded(jump, bombyxin, tmp_path):
    p = Propagator(jump=jump, width=16, layers=1, parts=3, steps=4, batch_size=8, cartesian=0)
    p.fit({'b': bombyxin}, progress=False)
    again = load_propagator(p.save(tmp_path/'m'))
    x, g = bombyxin.series[0][:3], lambda: torch.Generator().manual_seed(1)
    assert list(again.networks) == (['density'] if jump == 'mixture' else ['density', 'flow'])
    assert torch.equal(p.sample('b', x, generator=g()), again.sample('b', x, generator=g()))
    assert torch.allclose(p.log_density('b', x, x), again.log_density('b', x, x))
    assert torch.isfinite(p.log_density('b', x, bombyxin.series[0][1:4])).all()


def test_a_mixture_has_two_answers_and_residues_agree_on_them():
    "Two residues that jump to the same of two wells: one part each would put them in the middle, or apart."
    g = torch.Generator().manual_seed(0)
    well = torch.where(torch.rand(6000, 1, generator=g) < .5, 1.5, -1.5)
    x = well + .2*torch.randn(6000, 2, generator=g)
    chain = Chain(torch.tensor([0, 1]), torch.arange(2), torch.zeros(2, dtype=torch.long),
                  (torch.arange(11) < 1).repeat(2, 1), torch.tensor([True, True]))
    motion = Motion(chain, [x[:5000], x[5000:]], 1.)
    p = Propagator(jump='mixture', width=16, layers=1, parts=3, steps=300, batch_size=256, learning_rate=5e-3)
    p.fit({'t': motion}, progress=False)
    y = p.sample('t', x[:2000], generator=torch.Generator().manual_seed(1))
    assert (abs(abs(y) - 1.5) < .8).float().mean() > .95  # in a well, not between
    assert (y[:, 0].sign() == y[:, 1].sign()).float().mean() > .95  # and both in the same
    with pytest.raises(ValueError, match='flow, mixture'): Propagator(jump='leap')
