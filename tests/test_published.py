"The published propagator: each mend of the paper has a test that the paper's version fails; files, seeds, errors."
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mdtraj as md
import numpy as np
import pytest
import torch
from torch import nn

from foldbook.data import shipped_directory
from foldbook.published import (PAPER, Drift, PublishedOptions, as_motion, delta_rmsd, fill_up, load_published,
                                log_loss, noise_calibration, rmsd_profile, rollout, score_controls, sentences,
                                single_chains, step_errors, train)
from foldbook.molecules import build_chain
from foldbook.tokens import add_positions, euler_angles, euler_axes
from foldbook.tree import read_tree, to_cartesian
from foldbook.rebuilding import reconstruction_error

SMALL = dict(hidden=16, feedforward=16, heads=2, layers=1)


def wiggling(sequence, n=60, seed=0, spacing=1.0):
    "A peptide whose every atom shakes a little."
    t, rng = build_chain(sequence, 'helix'), np.random.default_rng(seed)
    heavy = t.atom_slice([a.index for a in t.topology.atoms if a.element.symbol != 'H'])
    return md.Trajectory(heavy.xyz + rng.normal(0, 0.003, (n, heavy.n_atoms, 3)).astype(np.float32), heavy.topology,
                         time=np.arange(n)*spacing)


@pytest.fixture(scope='module')
def bombyxin():
    tree, rng = read_tree(shipped_directory()/'1bom.pdb.xz'), np.random.default_rng(1)
    xyz = tree.positions + rng.normal(0, 0.003, (40, *tree.positions.shape))
    t = tree.trajectory(xyz)
    t.time = np.arange(40.)
    return t


@pytest.fixture(scope='module')
def complex_(bombyxin): return as_motion([bombyxin], width=12)


def two_peptides():
    return {'short': as_motion([wiggling('GASV')], width=12), 'long': as_motion([wiggling('KLEDRW', seed=1)], width=12)}


@pytest.fixture(scope='module')
def peptides(): return two_peptides()


@pytest.fixture(scope='module')
def fitted(peptides):
    return train(peptides, PublishedOptions(**SMALL, max_epochs=6, steps_per_epoch=20, learning_rate=5e-3),
                 progress=False)


def place(motion): # places and mask of one molecule in a batch
    return motion.code.places.float()[None], motion.code.mask[None]


# tokens

def test_a_motion_comes_back(bombyxin, complex_):
    tree = complex_.tree
    error = reconstruction_error(tree, np.asarray(tree.coordinates(bombyxin)), complex_.positions().numpy())
    assert error['backbone'].max() < 0.03 and error['heavy'].max() < 0.05 # nm; bonds that shake are constants here
    assert complex_.angles[0].shape == (40, int(tree.mask.sum())) and complex_.torsions[0].shape[1] < tree.mask.sum()
    assert complex_.series[0].dtype == torch.float32 and len(complex_[5:9]) == 4


def test_tumbling_is_taken_out(bombyxin):
    turned = bombyxin[:]
    for i, a in enumerate(np.linspace(0, 3, len(turned))):
        R = np.array([[np.cos(a), np.sin(a), 0], [-np.sin(a), np.cos(a), 0], [0, 0, 1]], np.float32)
        turned.xyz[i] = turned.xyz[i] @ R + i
    a, b = (as_motion([t], width=12).series[0] for t in (bombyxin, turned))
    assert (a - b).abs().max() < 1e-3


def test_two_angles_do_not_place_a_chain(complex_):
    "Item 2: with the third angle dropped, as under Eq. 2, the second chain stands elsewhere."
    first = complex_[:1]
    internals, xyz = first.code.internals(first.series[0]), first.positions().numpy()
    angles = euler_angles(internals.axes)
    whole, dropped = (internals._replace(axes=euler_axes(angles*torch.tensor(keep))) for keep in ([1., 1., 1.],
                                                                                                  [1., 1., 0.]))
    three, two = (to_cartesian(complex_.tree, i) for i in (whole, dropped))
    assert np.abs(np.asarray(three) - xyz).max() < 1e-5
    assert reconstruction_error(complex_.tree, xyz, two)['backbone'][0] > 0.2 # nm


def test_virtual_chains_are_the_chains(bombyxin):
    parts = single_chains(bombyxin, '1bom')
    assert list(parts) == ['1bom A', '1bom B'] and [p.topology.n_residues for p in parts.values()] == [20, 28]
    b = as_motion([parts['1bom B']], width=12)
    assert len(b.tree.segments) == 1 and b.code.mask[:2, 3:12].sum() == 0
    with pytest.raises(ValueError, match='one chain only'): single_chains(parts['1bom A'], 'A')


# the network

def test_padding_changes_nothing(peptides):
    torch.manual_seed(0)
    motions = list(peptides.values())
    drift, both = Drift(12, **SMALL).eval(), sentences([m.code for m in motions])
    batch = torch.stack([fill_up(m.series[0][3], both.mask.shape[1]) for m in motions])
    together, unguarded = drift(batch, *both.of(torch.tensor([0, 1]))), drift(batch, both.places, both.mask)
    for i, m in enumerate(motions):
        n, alone = len(m.code.mask), drift(m.series[0][3:4], *place(m))
        assert torch.allclose(together[i, :n], alone[0], atol=1e-6)
        assert not together[i, n:].any()
    n = len(motions[0].code.mask)
    assert not torch.allclose(unguarded[0, :n], together[0, :n], atol=1e-6)


def test_every_step_is_a_matrix_of_tokens(complex_):
    torch.manual_seed(1)
    drift = Drift(12, **SMALL).eval()
    y = add_positions(drift(complex_.series[0][:4], *place(complex_)), -complex_.code.places.float())
    cos, sin = y.chunk(2, 2)
    assert torch.allclose((cos**2 + sin**2), complex_.code.mask[None, :, :12].float().expand_as(cos), atol=1e-5)
    assert (sin[:, 0] >= 0).all()


def paper_normalised(y, mask): # N_theta of Eq. 13 as printed, then M
    cos, sin = y.chunk(2, 2)
    size = (cos**2 + sin**2).sqrt()
    return torch.cat([cos/size, sin/size], 2)*mask


def test_the_paper_divides_zero_by_zero_and_leaves_the_manifold(complex_):
    "The mask comes first, and the partner of an origin is clamped."
    code, tokens = complex_.code, complex_.series[0][:1]
    y = add_positions(tokens, -code.places.float()).clone()
    y[:, 0, 12:15] *= -1 # a negative partner, as D_E may write it
    printed = paper_normalised(y, code.mask)
    assert printed.isnan().any() and (printed[:, 0, 12:15] < 0).all()

    class Writes(nn.Module): # stands for the dense networks
        def forward(self, x, src_key_padding_mask=None): return x
    drift = Drift(12, **SMALL)
    drift.before, drift.layers, drift.after = nn.Identity(), Writes(), nn.Identity()
    out = drift(add_positions(y, code.places.float()), *place(complex_))
    assert out.isfinite().all() and torch.allclose(out, tokens, atol=1e-5)


def test_gradients_are_finite_on_the_clamped_and_the_padded(peptides):
    drift, both = Drift(12, **SMALL), sentences([m.code for m in peptides.values()])
    windows = torch.stack([fill_up(m.series[0][:4], both.mask.shape[1]) for m in peptides.values()])
    log_loss(step_errors(drift, windows, *both.of(torch.tensor([0, 1]))), torch.tensor([0, 1])).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in drift.parameters())


def test_the_paper_size_is_the_paper_size():
    assert sum(p.numel() for p in Drift(80, **PAPER).parameters()) == 3_577_216


# the loss

class Shifted(nn.Module): # a drift that is wrong by a known amount in every entry that exists
    def __init__(self, by):
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by))
    def forward(self, tokens, places, mask, padding=None): return tokens + self.by*mask


def still(motion, n=3): return motion.series[0][:1].expand(n, -1, -1)[None]


def test_errors_are_per_entry_and_over_steps(peptides):
    m = peptides['long']
    e = step_errors(Shifted(0.1), still(m), *place(m))
    assert float(e.detach()) == pytest.approx((0.1**2 + 0.2**2)/2, rel=1e-4)


def test_short_rows_count_by_what_they_have(peptides):
    "Item 8: a mean over the whole matrix depends on how wide and how long the padding is."
    def paper(drift, w, places, mask): return (drift(w[:, 0], places, mask) - w[:, 1]).square().mean()
    for by in (0.1, 0.3):
        ours, printed = [], []
        for width in (12, 20):
            m = as_motion([wiggling('GASV')], width=width)
            w = fill_up(still(m, 2), 40 if width == 20 else len(m.code.mask))
            rows = [fill_up(x, w.shape[2]) for x in place(m)]
            ours.append(float(step_errors(Shifted(by), w, *rows).detach()))
            printed.append(float(paper(Shifted(by), w, *rows).detach()))
        assert ours[0] == pytest.approx(ours[1], rel=1e-4) and printed[0] > 3*printed[1]


def test_the_logarithm_has_a_floor(peptides):
    "Item 8: Eq. 12 is minus infinity at a perfect prediction, and its gradient is no number."
    m, drift = peptides['short'], Shifted(0.0)
    e = step_errors(drift, still(m), *place(m))
    loss = log_loss(e, torch.zeros(1, dtype=int))
    loss.backward()
    assert loss.isfinite() and drift.by.grad.isfinite() and loss.item() == pytest.approx(np.log(1e-6))
    drift = Shifted(0.0)
    printed = step_errors(drift, still(m), *place(m)).mean().log()
    printed.backward()
    assert not printed.isfinite() and not drift.by.grad.isfinite()


def test_every_protein_has_the_same_say():
    "Item 8: the logarithm of a pooled error listens to the protein with the largest one."
    def share(loss):
        e = torch.tensor([0.001, 1.0], requires_grad=True) # of two proteins
        loss(e).backward()
        relative = e.grad*e.detach() # what one per cent of each error is worth
        return float(relative[0]/relative.sum())
    assert share(lambda e: log_loss(e, torch.tensor([0, 1]))) == pytest.approx(0.5, abs=0.001)
    assert share(lambda e: e.mean().log()) < 0.01


def test_proteins_with_more_windows_do_not_count_more():
    e = torch.tensor([0.1, 0.1, 0.1, 0.4])
    assert log_loss(e, torch.tensor([0, 0, 0, 1])).item() == pytest.approx((np.log(0.1) + np.log(0.4))/2, abs=1e-4)
    # protein 1 is not in this batch
    assert log_loss(e, torch.tensor([0, 0, 0, 2])).item() == pytest.approx((np.log(0.1) + np.log(0.4))/2, abs=1e-4)


def test_the_mean_is_what_the_loss_asks_for():
    "Item 8: the best drift of a process without memory is a constant, whatever the logarithm."
    rng = np.random.default_rng(0)
    theta = torch.tensor(rng.normal(0, 0.4, (4000, 1, 1)), dtype=torch.float32)
    tokens = torch.cat([theta.cos(), theta.sin()], 2)
    mean = torch.atan2(tokens[..., 1].mean(), tokens[..., 0].mean())
    error = {}
    for name, guess in (('mean', torch.stack([mean.cos(), mean.sin()]).expand(3999, 1, 2)),
                        ('moving', tokens[torch.randperm(3999, generator=torch.Generator().manual_seed(0))])):
        error[name] = (guess - tokens[1:]).square().mean()
    assert error['mean'] < 0.6*error['moving'] # a real sample of the right law is worse than no motion at all


# rollouts

def test_noise_is_carried_on(fitted, peptides):
    """Item 6: Eq. 10 adds noise after all deterministic steps; a stochastic process moves on from where the noise
    has put it."""
    class Carries(nn.Module): # the identity, but for dropout
        def __init__(self):
            super().__init__()
            self.drop, self.w = nn.Dropout(0.0), nn.Parameter(torch.zeros(1))
        def forward(self, tokens, places, mask, padding=None):
            turn = self.drop(torch.ones(tokens.shape[0], 1, places.shape[-1])) - 1
            return add_positions(tokens, 0.01*turn.expand_as(places))
    walker, m = replace(fitted, drift=Carries()), peptides['short']
    rolls = rollout(walker, 'short', m, 41, [0]*300, dropout=0.5, seed=3)
    spread = np.array([a[:, 0] for a in rolls.angles]).std(0)
    assert spread[40]/spread[1] == pytest.approx(np.sqrt(40), rel=0.15)

    def paper(n): # F^i, then the noise of one step
        end = replace(m, series=[rollout(walker, 'short', m, n)[-1:].series[0]])
        return np.array([a[1, 0] for a in rollout(walker, 'short', end, 2, [0]*300, dropout=0.5, seed=3).angles]).std()
    assert paper(41) == pytest.approx(paper(2), rel=0.15)


def test_dropout_is_not_the_noise_of_the_data(fitted, peptides):
    "Item 7: it is set by the rate and the activations; heating the data does not change it."
    cold, code = peptides['short'], peptides['short'].code
    table = noise_calibration(fitted, 'short', cold, rates=(1e-4, 1e-2, 0.2), n_frames=20, passes=3)
    assert table.noise.is_monotonic_increasing and table['needed'].nunique() == 1
    rng = np.random.default_rng(5)
    angle = torch.tensor(rng.normal(0, 0.3, (len(cold), *code.places.shape))*code.mask[:, :12].numpy())
    hot = replace(cold, series=[add_positions(cold.series[0].double(), angle).float()])
    after = noise_calibration(fitted, 'short', hot, rates=(0.2,), n_frames=20, passes=3)
    assert after['needed'][0] > 2*table['needed'][0] and after.noise[0] < 1.5*table.noise[2]


def test_rollouts_repeat_and_stand_side_by_side(fitted, peptides):
    made = lambda start, **kw: rollout(fitted, 'short', peptides['short'], 6, start, **kw).series
    a, b = (made([0, 7], dropout=0.2, seed=4) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert not torch.equal(a[0], made([0, 7], dropout=0.2, seed=5)[0])
    single = made(7)[0]
    assert torch.allclose(made([0, 7])[1], single, atol=1e-6)
    assert torch.equal(single[0], peptides['short'].series[0][7])
    state = torch.get_rng_state()
    made(0, dropout=0.1)
    assert torch.equal(state, torch.get_rng_state())


def test_rollouts_leave_the_drift_as_it_was(fitted, peptides):
    layer = fitted.drift.layers.layers[0]
    rollout(fitted, 'short', peptides['short'], 3, dropout=0.3)
    assert not fitted.drift.training and layer.dropout.p == 0.0 and layer.self_attn.dropout == 0.0
    train_rate = Drift(12, **SMALL, dropout=0.1)
    rollout(replace(fitted, drift=train_rate), 'short', peptides['short'], 3, dropout=0.3)
    assert train_rate.layers.layers[0].dropout.p == 0.1 and train_rate.layers.layers[0].self_attn.dropout == 0.1


def test_a_run_without_dropout_is_the_drift(fitted, peptides):
    m = peptides['long']
    made = rollout(fitted, 'long', m, 3, 5).series[0]
    with torch.no_grad(): one = fitted.drift(m.series[0][5:6], *place(m))
    assert torch.allclose(made[1], one[0], atol=1e-6)


# training

BRIEF = PublishedOptions(**SMALL, max_epochs=4, steps_per_epoch=10, learning_rate=5e-3, dropout=0.1)
KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_published import BRIEF, two_peptides
from foldbook.published import Drift, train
forward, calls = Drift.forward, []
def dies(*args):
    calls.append(1)
    if len(calls) == 4*25: os.kill(os.getpid(), signal.SIGKILL) # four steps ahead, in the third epoch
    return forward(*args)
Drift.forward = dies
train(two_peptides(), BRIEF, {directory!r}, progress=False)
"""


def test_training_learns_repeats_and_resumes_after_a_kill(peptides, tmp_path):
    code = KILLED.format(tests=str(Path(__file__).parent), directory=str(tmp_path))
    child = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert [f.name for f in tmp_path.iterdir()] == ['published.ckpt']
    straight, resumed = train(peptides, BRIEF, progress=False), train(peptides, BRIEF, tmp_path, progress=False)
    assert straight.history == resumed.history and len(straight.history) == 4
    assert all(torch.equal(x, y) for x, y in zip(straight.drift.parameters(), resumed.drift.parameters()))
    assert straight.history[-1]['train'] < straight.history[0]['train'] - 0.2
    with pytest.raises(ValueError, match='belongs to another training or other data'):
        train(peptides, replace(BRIEF, seed=1), tmp_path, progress=False)


def test_the_rate_falls_on_a_plateau(peptides):
    "Of a loss below zero, torch's default calls what is slightly worse an improvement, and the rate would stay."
    options = PublishedOptions(**SMALL, max_epochs=30, steps_per_epoch=1, learning_rate=0.3, patience=1)
    made = train(peptides, options, progress=False).history
    assert made[0]['rate'] == 0.3 and made[-1]['rate'] < 0.3 and len(made) < 30
    assert made[-1]['validation'] < 0
    default = torch.optim.lr_scheduler.ReduceLROnPlateau(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3),
                                                         factor=0.5, patience=1)
    for _ in range(30): default.step(-0.48)
    assert default.get_last_lr() == [0.3]


def test_save_and_load(tmp_path, fitted, peptides):
    again = load_published(fitted.save(tmp_path/'model'))
    assert again.proteins == ['short', 'long'] and again.options == fitted.options and again.history == fitted.history
    a, b = (rollout(p, 'short', peptides['short'], 4).series[0] for p in (again, fitted))
    assert torch.equal(a, b)
    assert sorted(p.name for p in (tmp_path/'model').iterdir()) == ['published.json', 'published.safetensors']
    with pytest.raises(FileNotFoundError, match='has no published.json'): load_published(tmp_path)


# what goes wrong is said

def test_errors_say_what_to_do(fitted, peptides, complex_):
    short, long = peptides.values()
    few = dict(options=PublishedOptions(**SMALL), progress=False)
    with pytest.raises(ValueError, match='no protein to learn from'): train({})
    with pytest.raises(ValueError, match='long: frames are 1 ps apart and those of slow 2 ps'):
        train(dict(slow=replace(short, step=2.0), long=long), **few)
    with pytest.raises(ValueError, match='wide: tokens are 40 wide and those of short 24'):
        train(dict(short=short, wide=as_motion([wiggling('GG')], width=20)), **few)
    with pytest.raises(ValueError, match='12 frames leave none to learn from; 25 are needed'):
        train(dict(short=short[:12]), **few)
    with pytest.raises(ValueError, match='heads=5 does not divide the 24'):
        train(dict(short=short), PublishedOptions(heads=5))
    with pytest.raises(ValueError, match='max_epochs=0; it must be at least 1'): PublishedOptions(max_epochs=0)
    with pytest.raises(ValueError, match='share of each trajectory'): PublishedOptions(validation=1.0)
    with pytest.raises(ValueError, match='1bom was not trained on, only short, long'):
        rollout(fitted, '1bom', complex_, 3)
    assert len(rollout(fitted, '1bom', complex_, 3, unseen=True)) == 3
    with pytest.raises(ValueError, match='40 wide and the propagator has 24'):
        rollout(fitted, 'short', as_motion([wiggling('GASV')], width=20), 3)
    with pytest.raises(ValueError, match='2 ps apart and the propagator steps 1 ps'):
        rollout(fitted, 'short', replace(short, step=2.0), 3)
    with pytest.raises(ValueError, match='L is 5'): as_motion([wiggling('GASV')], width=5)
    gap = wiggling('GASV')
    gap.time = np.r_[gap.time[:30], gap.time[30:] + 7]
    with pytest.raises(ValueError, match='frames are 1 to 8 ps apart'): as_motion([gap])


# the published score

def test_profiles_of_a_complex(complex_):
    p = rmsd_profile(complex_)
    assert list(p) == ['total', 'chain A', 'chain B'] and all(v[0] < 1e-3 and len(v) == 40 for v in p.values())
    assert delta_rmsd(p, p) == {k: 0.0 for k in p}
    third = rmsd_profile(complex_, complex_[3:4].positions()[0])
    assert list(third) == list(p) and third['total'][3] < 1e-3


def test_eq_14_rewards_no_motion():
    "Item 9: a constant beats an independent sample of the very law it should have, by 0.798 to 1.128 of the spread."
    rng = np.random.default_rng(0)
    sigma = 0.05
    a, b = 0.3 + sigma*rng.normal(size=(2, 40_000))
    score = score_controls(a, b)
    assert score['constant at the mean'] == pytest.approx(0.798*sigma, rel=0.02)
    assert score['frozen frame'] == pytest.approx(1.128*sigma, rel=0.1)
    assert score['independent MD'] == pytest.approx(1.128*sigma, rel=0.02)
    still, moving = (delta_rmsd(dict(total=x), dict(total=b))['total'] for x in (np.full(40_000, 0.3), a))
    assert still < moving
