"Runs that are killed, stopped at any write, or meet a full disk end with the same bytes; formats; wrong settings."
import json
import signal
import subprocess
import sys
import time

import mdtraj as md
import numpy as np
import pytest

import foldbook.engine as fs
from foldbook.go import GoModel, energies


JOB = dict(n_frames=120, steps_per_frame=100, seed=4, burn_in=15, segment=10, start='extended', progress=False)


@pytest.fixture(scope='session')
def whole(model, tmp_path_factory): return fs.simulate(model, tmp_path_factory.mktemp('whole')/'whole.xtc', **JOB)


def test_killed_run_ends_with_the_same_bytes(model, whole, tmp_path):
    m = model.save(tmp_path/'m.json')
    code = ('from foldbook.engine import simulate; from foldbook.go import GoModel; '
            f'simulate(GoModel.load({str(m)!r}), {str(tmp_path/"killed.xtc")!r}, **{JOB!r})')
    segments, rng = tmp_path/'killed.xtc.segments', np.random.default_rng(0)
    written = lambda: len(list(segments.glob('0*.npz')))
    kills = 0
    for _ in range(3):
        before = written()
        p = subprocess.Popen([sys.executable, '-c', code])
        while p.poll() is None and written() == before: time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        if p.poll() is None:
            p.send_signal(signal.SIGKILL)
            kills += 1
        p.wait()
        assert not (tmp_path/'killed.xtc').exists() or (tmp_path/'killed.xtc').read_bytes() == whole.read_bytes()
    killed = fs.simulate(GoModel.load(m), tmp_path/'killed.xtc', **JOB)
    assert kills >= 1 and killed.read_bytes() == whole.read_bytes()
    t = md.load(str(killed), top=model.native)
    assert len(t) == 120 and np.allclose(np.diff(t.time), 100*model.time_step, atol=1e-4)
    assert sorted(p.name for p in tmp_path.iterdir() if 'killed' in p.name) == ['killed.xtc', 'killed.xtc.json']


@pytest.mark.parametrize('where, function, call', [(fs.Pieces, 'add', 5), (fs, 'write_json', 1), (fs, '_joined', 1)])
def test_stopped_at_any_write_it_goes_on(model, whole, tmp_path, monkeypatch, where, function, call):
    """Stopped at a segment, before the record, in the middle of the last file: nothing half-written has a name that
    counts."""
    real, calls = getattr(where, function), []

    def fail(*args, **arrays):
        calls.append(1)
        if len(calls) == call: raise KeyboardInterrupt
        return real(*args, **arrays)
    monkeypatch.setattr(where, function, fail)
    with pytest.raises(KeyboardInterrupt): fs.simulate(model, tmp_path/'b.xtc', **JOB)
    (tmp_path/'b.xtc.segments'/'.1-000000120.npz').write_bytes(b'half a segment')
    monkeypatch.undo()
    assert fs.simulate(model, tmp_path/'b.xtc', **JOB).read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['b.xtc', 'b.xtc.json']


@pytest.mark.parametrize('suffix', ['xtc', 'dcd', 'h5'])
def test_formats_and_arrays(model, tmp_path, suffix):
    job = JOB | dict(n_frames=33, segment=8, keep=('energy', 'forces'), atoms=[1, 4, 20])
    out = fs.simulate(model, tmp_path/f'a.{suffix}', **job)
    t = md.load(str(out), **({} if suffix == 'h5' else dict(top=model.native.topology.subset([1, 4, 20]))))
    full = md.load(str(fs.simulate(model, tmp_path/'b.h5', **JOB | dict(n_frames=33, segment=8))))
    np.testing.assert_allclose(t.xyz, full.xyz[:, [1, 4, 20]], atol=6e-4 if suffix == 'xtc' else 1e-6)
    if suffix != 'dcd': np.testing.assert_allclose(t.time, 0.4*np.arange(33), atol=1e-5)
    with np.load(out.with_suffix('.npz')) as z:
        assert z['energy'].shape == (33,) and z['forces'].shape == (33, 21, 3) # of all atoms
        np.testing.assert_allclose(z['energy'], energies(model, full.xyz).sum(1), atol=0.05)
    made = json.loads((tmp_path/f'a.{suffix}.json').read_text())
    assert made['keep'] == ['energy', 'forces'] and made['versions']['openmm']
    assert made['temperature'] == model.temperature
    with pytest.raises(ValueError, match='a.trr: write .xtc, .dcd or .h5'): fs.simulate(model, tmp_path/'a.trr', **job)


@pytest.mark.parametrize('temperature', [0, -3, float('nan')])
def test_temperature_is_above_zero(model, tmp_path, temperature):
    with pytest.raises(ValueError, match='above zero'):
        fs.simulate(model, tmp_path/'cold'/'a.xtc', **JOB | dict(temperature=temperature))
    assert not (tmp_path/'cold').exists()


def test_a_full_disk_is_said_and_costs_nothing(model, whole, tmp_path, monkeypatch):
    "Frames finished before are kept; with room again the run ends with the same bytes."
    real, calls = np.savez, []

    def full(f, **arrays):
        calls.append(1)
        if len(calls) == 4:
            f.write(b'half')
            raise OSError(28, 'No space left on device')
        real(f, **arrays)
    monkeypatch.setattr(np, 'savez', full)
    with pytest.raises(OSError, match='no space left to write 000000040.npz.*run the same command again'):
        fs.simulate(model, tmp_path/'b.xtc', **JOB)
    assert sorted(p.name for p in (tmp_path/'b.xtc.segments').iterdir()) == ['000000010.npz', '000000020.npz',
                                                                             '000000030.npz', 'task.json']
    monkeypatch.undo()
    assert fs.simulate(model, tmp_path/'b.xtc', **JOB).read_bytes() == whole.read_bytes()



def test_other_settings_do_not_continue_a_run(model, tmp_path):
    fs.simulate(model, tmp_path/'a.xtc', **JOB)
    with pytest.raises(ValueError, match='choose another output'):
        fs.simulate(model, tmp_path/'a.xtc', **JOB | dict(seed=5))
    (tmp_path/'c.xtc.segments').mkdir()
    (tmp_path/'c.xtc.segments'/'task.json').write_text('{"seed": 5}')
    with pytest.raises(ValueError, match='c.xtc.segments holds another run .seed, .*; delete it or choose another'):
        fs.simulate(model, tmp_path/'c.xtc', **JOB)
    with pytest.raises(ValueError, match="start='folded' is not known; choose one of native, extended"):
        fs.simulate(model, tmp_path/'d.xtc', **JOB | dict(start='folded'))


def test_a_failed_integration_is_not_written(model, tmp_path):
    with pytest.raises(ValueError, match='hot.xtc.*integration failed'):
        fs.simulate(model, tmp_path/'hot.xtc', **JOB | dict(temperature=1e7))
    assert not list(tmp_path.glob('hot*.xtc')) and not list((tmp_path/'hot.xtc.segments').glob('*.npz'))
