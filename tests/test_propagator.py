"The propagator beyond its chapters: two chains, unbiased weights, devices of attention, files that are wrong."
import json, lzma
from pathlib import Path

import mdtraj as md
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from foldbook.propagation import bounds_of, jump, run
from foldbook.propagator import (Chain, Density, Motion, Options, Propagator, anchors, chain_of, distance_rates,
                                 linear_start, load_propagator, pairs, seen, to_columns,
                                 to_positions, typical, typical_start, wrap)
from foldbook.tree import read_tree, reconstruction_error

DATA = Path(__file__).parents[1]/'data'


@pytest.fixture(scope='module')
def bombyxin(tmp_path_factory): # two chains that tumble and move against each other
    path = tmp_path_factory.mktemp('1bom')/'1bom.pdb'
    path.write_bytes(lzma.open(DATA/'1bom.pdb.xz').read())
    tree = read_tree(path).measured()
    x0, poses = to_columns(tree, tree.positions[None])
    g = torch.Generator().manual_seed(0)
    return Motion(chain_of(tree), [x0 + 0.05*torch.cumsum(torch.randn(60, x0.shape[1], generator=g), 0)*0.3
                                   for _ in range(2)], 1.0, tree, poses)


def test_two_chains_go_to_columns_and_back(bombyxin):
    x = bombyxin.series[0]
    r = to_positions(bombyxin, x)
    again, _ = to_columns(bombyxin.tree, r, bombyxin.poses)
    assert float(bombyxin.chain.minus(again, x).abs().max()) < 1e-4
    Q = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    turned = r @ (Q*torch.linalg.det(Q)) # a rotation, no mirror image
    again, _ = to_columns(bombyxin.tree, turned + 3.0, bombyxin.poses)
    assert float(bombyxin.chain.minus(again, x).abs().max()) < 1e-4


def test_structure_is_rebuilt_whole(bombyxin):
    x, poses = to_columns(bombyxin.tree, bombyxin.tree.positions[None])
    back = to_positions(Motion(bombyxin.chain, [], 1.0, bombyxin.tree, poses), x)
    error = reconstruction_error(bombyxin.tree, bombyxin.tree.positions[None], back.numpy())
    assert error['backbone'][0] < 1e-3 and error['heavy'][0] < 0.03 # nm


def test_anchors_are_whole_residues_in_the_middle(bombyxin):
    for atoms, segment in zip(anchors(bombyxin.tree), bombyxin.tree.segments):
        assert [bombyxin.tree.names[a] for a in atoms] == ['N', 'CA',
                                                           'C'] and len(set(bombyxin.tree.residue[atoms])) == 1
        assert 0.3 < list(segment).index(atoms[0])/len(segment) < 0.7


def test_loose_end_moves_no_chain(bombyxin):
    "A turn of the first residue's psi moves what is before it, seen from the middle, and not the other chain."
    x = bombyxin.series[0][:1]
    moved = x.clone()
    moved[:, 0] += 1.0
    a, b = (to_positions(bombyxin, v)[0] for v in (x, moved))
    second = bombyxin.tree.segment[bombyxin.tree.residue] == 1
    assert float((a - b)[second].abs().max()) < 1e-9


def test_two_chain_run_stays_whole_and_is_reproducible(bombyxin, tmp_path):
    p = Propagator(width=16, layers=1, steps=2, batch_size=8).fit({'1bom': bombyxin}, progress=False)
    bounds = bounds_of(bombyxin)
    start = bombyxin.series[0][:2]
    a = run(p, '1bom', start, 6, bounds=bounds, seed=3, piece=3, progress=False, directory=tmp_path)
    b = run(p, '1bom', start, 6, bounds=bounds, seed=3, piece=3, progress=False)
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
    distance_rates(bombyxin, x.expand(16, -1), v - targets).square().sum().backward()
    rates = v.grad.clone()
    far = lambda y: torch.cdist(to_positions(bombyxin, y)[:, ::20], to_positions(bombyxin, y)[:, ::20])
    v.grad = None
    (far(x + v) - far(x + targets)).square().sum().backward()
    scale = float(distance_rates(bombyxin, x.expand(16, -1), targets).square().sum())
    assert float(rates.abs().max())/scale < 1e-4 < float(v.grad.abs().max())/scale


def test_attention_knows_segments_apart(bombyxin):
    torch.manual_seed(0)
    d, s = Density(16, 1), linear_start(bombyxin, bombyxin)
    with torch.no_grad():
        d.head.weight.normal_(std=0.3)
        d.trunk.attend[0].apart.fill_(-1e9)
    x = bombyxin.series[0][:2]
    other = x.clone()
    second = bombyxin.chain.segments[bombyxin.chain.used//11] == 1
    other[:, second] += 0.3
    read = lambda v: d.head(d.trunk(seen(bombyxin.chain, s, v), bombyxin.chain, torch.ones(2, 1)))[:,
        bombyxin.chain.segments == 0]
    assert torch.allclose(read(x), read(other), atol=1e-6) # wholly apart: no message
    with torch.no_grad(): d.trunk.attend[0].apart.fill_(0)
    assert not torch.allclose(read(x), read(other), atol=1e-6)


@given(st.floats(-20, 20), st.floats(-20, 20))
def test_wrap_is_a_group(a, b):
    assert -np.pi <= wrap(a) < np.pi
    assert abs(wrap(wrap(a) + wrap(b) - wrap(a + b))) < 1e-9


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(2, 30), st.integers(2, 30))
def test_pairs_never_cross_trajectories(lag, n, m):
    series = [torch.arange(n)[:, None] + 0., 1000 + torch.arange(m)[:, None] + 0.]
    if max(n, m) <= lag: return
    x, y = pairs(series, lag)
    assert torch.equal(y - x, torch.full_like(x, lag)) and len(x) == max(0, n - lag) + max(0, m - lag)


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
    m = Motion(a, [torch.cat([1 + 0.1*torch.randn(5000, 2, generator=g), -1 + 0.3*torch.randn(5000, 2, generator=g)],
                             1)])
    s = typical_start(typical([m], 1), b)
    assert torch.allclose(s.mean, torch.tensor([-1, -1, 1, 1, 1, 1.]), atol=0.02)
    assert torch.allclose(s.width, torch.tensor([.3, .3, .1, .1, .1, .1]),
                          atol=0.02) and float(s.step.abs().max()) < 0.05
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


def test_broken_files(tmp_path, bombyxin):
    p = Propagator(width=16, layers=1, steps=1, batch_size=4).fit({'1bom': bombyxin}, progress=False)
    directory = p.save(tmp_path/'model')
    q = load_propagator(directory)
    x = bombyxin.series[0][:2]
    one, two = (v.sample('1bom', x, generator=torch.Generator().manual_seed(0)) for v in (p, q))
    assert torch.allclose(one, two, atol=1e-6)
    assert not list(tmp_path.rglob('*.pkl')) and not list(tmp_path.rglob('*.pt'))
    (directory/'propagator.json').unlink()
    with pytest.raises(FileNotFoundError, match='holds no propagator'): load_propagator(directory)


@pytest.mark.parametrize('options, word', [(dict(lags=()), 'lags'), (dict(lags=(0,)), 'lags'), (dict(start='x'), 'own'),
                                           (dict(width=30), 'width'), (dict(steps=0), 'steps')])
def test_options_that_make_no_sense(options, word):
    with pytest.raises(ValueError, match=word): Options(**options)


def test_training_twice_gives_the_same(bombyxin):
    a, b = (Propagator(width=16, layers=1, steps=3, batch_size=4, seed=5).fit({'1bom': bombyxin}, progress=False)
            for _ in range(2))
    assert all(torch.equal(u, v) for u, v in zip(a.flow.state_dict().values(), b.flow.state_dict().values()))


def test_stored_results_say_what_the_chapter_says():
    r = json.loads((DATA/'propagator.json').read_text())['ala2, ten times as long']['table']
    floor, made, line = (r[k] for k in ('molecular dynamics', 'propagator', 'VAR(1) + noise'))
    assert made['distribution'] < 0.5*line['distribution'] and made['memory'] < 0.5*line['memory'] and abs(made['timescale'] - 1) < abs(line['timescale'] - 1)
    assert made['novelty'] > 0.5 and made['valid'] == 1 and made['fault'] == 'none'
