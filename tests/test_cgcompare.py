"Comparing a run with its reference: known populations, weights out of equilibrium, free energies apart."
import math

import mdtraj as md
import numpy as np
import pytest
import torch
from test_cg import NAMES, zigzag

import foldbook.cgcompare as cgcompare
from foldbook.frames import ca_chain


def test_free_energies_apart_from_a_constant():
    p = np.random.default_rng(0).random(30)
    assert cgcompare.free_energy_mse(p, 7*p) < 1e-20
    assert math.isnan(cgcompare.free_energy_mse(np.array([1., 0]), np.array([0, 1.])))


@pytest.fixture(scope='module')
def hairpin(): # two states of ten beads, visited in turns; and a biased copy
    rng, native = np.random.default_rng(0), zigzag(10, dtype=torch.float32)[0].numpy()
    other = native.astype(float)
    other[5:, 1] += 0.8

    def walk(n, stay=(0.98, 0.96)):
        s = np.zeros(n, int)
        for t in range(1, n): s[t] = s[t-1] if rng.random() < stay[s[t-1]] else 1 - s[t-1]
        return (np.where(s[:, None, None], other, native) + rng.normal(0, 0.03, (n, 10, 3))).astype(np.float32)
    return native, [walk(3000) for _ in range(4)], [walk(3000, (0.99, 0.99)) for _ in range(4)]


def test_comparison_finds_known_populations(hairpin):
    native, reference, run = hairpin
    top = md.Trajectory(native, ca_chain(NAMES))
    L = cgcompare.fit_landscape(reference, top, lag=2, n_clusters=20, bins=20, elements=dict(start=(0, 4)))
    table, s = cgcompare.compare(L, reference, {'run': run, 'weighted': run}, {'weighted': 2})
    assert abs(s['reference'].populations[0] - 2/3) < 0.05
    for name in ('run', 'weighted'): assert abs(table.loc[name, 'ddG (kT)'] + math.log(2)) < 0.3
    assert table.loc['floor (halves)', 'JS (nats)'] < table.loc['run', 'JS (nats)'] < 0.1
    assert table.loc['reference', 'JS (nats)'] == 0
    assert 0 < table.loc['run', 'RMSD min (nm)'] < table.loc['run', 'RMSD native (nm)'] < 0.1
    assert table.loc['run', 'start < 0.2 nm'] == 1 and table.loc['run', 'outside'] == 0
    np.testing.assert_allclose(s['run'].surface.sum(), 1)
    np.testing.assert_allclose(np.diag(s['run'].contacts), 1)


def test_weights_repair_a_start_out_of_equilibrium(hairpin):
    native, reference, _ = hairpin
    L = cgcompare.fit_landscape(reference, md.Trajectory(native, ca_chain(NAMES)), lag=2, n_clusters=10)
    pieces = [x[k:k + 25] for x in reference for k in range(0, 3000, 25)]
    pieces = [p for p in pieces if L.states[L.clusters(L.project(p[:1]))][0] == 0] # all start native
    plain, weighted = (cgcompare.summarize(L, pieces, lag).populations[0] for lag in (None, 1))
    truth = cgcompare.summarize(L, reference).populations[0]
    assert plain > truth + 0.05 and abs(weighted - truth) < 0.05


def test_lag_longer_than_the_run_is_an_error():
    with pytest.raises(ValueError, match='longest trajectory has 5 frames'):
        cgcompare.msm_weights([np.zeros(5, int)], 5)
