"Figures, page and README: they show what they are given."
import json

import matplotlib.pyplot as plt
import numpy as np
import pytest

from foldbook.base import write_json
from foldbook.evaluate import Candidate, judge, leaderboard, read_leaderboard
from foldbook.report import (figure_calibration, figure_free_energy, figure_ladder, figure_learning, figure_profiles,
                             figure_series, figure_shooting, markdown_table, write_readme)
from foldbook.systems import lshape2d


@pytest.fixture(scope='module')
def toy():
    "The exact committor of the L-shaped path, as a candidate, and its row."
    system = lshape2d()
    path = system.sample(40_000, 2, seed=1)
    states, q = [system.states[p] for p in path], [system.committor[p] for p in path]
    c = Candidate('q', 'student', q, states, shots=(np.linspace(0, 1, 20), np.arange(20), np.full(20, 20)))
    row, z = judge(c, n_bootstrap=0)
    return c, row | dict(chosen=True), z


def test_figures_show_what_they_are_given(toy):
    c, row, z = toy
    drawn = lambda f: [a for a in f.axes if a.has_data()]
    assert [a.get_title().split('\n')[0] for a in drawn(figure_profiles(dict(a=z, b=z, c=z, d=z)))] == list('abcd')
    rows = [row, row | dict(coordinate='x', kind='one-dimensional'), row | dict(coordinate='seen', in_sample=True)]
    assert len(drawn(figure_ladder(rows))[0].lines) == len(rows) + 1  # and the limit
    assert len(drawn(figure_calibration([c, c]))) == 1
    assert len(drawn(figure_free_energy(c.r, 'q'))) == 2
    assert [a.get_title() for a in drawn(figure_series(c.r, c.states, names=['one', 'two']))] == ['one', 'two']
    curves = dict(a=dict(epoch=[0, 1], log_loss=[1, .5], t_max=[3, 2]))
    assert [a.get_title() for a in drawn(figure_learning(curves))] == ['log loss', 't max']
    assert 'RMSE' in drawn(figure_shooting([c]))[0].get_title()
    plt.close('all')


def test_free_energy_of_a_flat_diffusion():
    rng = np.random.default_rng(0)
    x = np.cumsum(rng.normal(0, .02, 400_000))
    r = abs((x + 1) % 2 - 1)  # reflected at both ends
    axes = figure_free_energy([r], 'x').axes
    (at, f), (natural, _) = (a.lines[0].get_data() for a in axes)
    assert np.ptp(f[5:-5]) < .5
    assert abs(np.ptp(natural)/np.ptp(at)*.02/np.sqrt(2) - 1) < .05  # D = step**2/2
    plt.close('all')


def test_free_energy_without_interior_frames_is_an_empty_picture():
    figure_free_energy([np.array([0., 1., 0., 1.])], 'nothing')
    plt.close('all')


def test_readme(tmp_path, toy):
    table = leaderboard([toy[1]])
    (tmp_path/'figures').mkdir()
    (tmp_path/'figures'/'zq.png').write_bytes(b'png')
    write_json(tmp_path/'leaderboard.json', dict(headline='It passes.', rows=table.to_dict('records')))
    readme = tmp_path/'README.md'
    readme.write_text('# a\n<!-- leaderboard:start -->\nold\n<!-- leaderboard:end -->\nb\n')
    write_readme(tmp_path, readme, tmp_path/'fig.png')
    once = readme.read_text()
    middle = markdown_table(json.loads((tmp_path/'leaderboard.json').read_text())['rows'])
    assert once == f'# a\n<!-- leaderboard:start -->\nIt passes.\n\n{middle}\n<!-- leaderboard:end -->\nb\n'
    assert '**q**' in once and (tmp_path/'fig.png').read_bytes() == b'png'
    write_readme(tmp_path, readme)
    assert readme.read_text() == once
    readme.write_text('no marks')
    with pytest.raises(ValueError, match='README.md: needs one line'): write_readme(tmp_path, readme)
    assert read_leaderboard(tmp_path).coordinate[0] == 'q'
