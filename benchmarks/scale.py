"""Peak memory and CPU time of `foldbook features`, `zq` and `run` against the number of frames.

Run with `python benchmarks/scale.py` (`--frames 100000` for the first line only; `--keep FOLDER` leaves the files).
Frames are those of the shipped villin, one file after the other with times that go on, so that a file of any length
is real. Every command is a process of its own, with one worker; its memory is what the operating system counted at
most, its files in the page cache included. `run` learns one small network, a regression and the committor with
memory. Results are written to benchmarks/scale.json beside this file.

Measured on two cores with other work beside it (2026-12-01), CPU seconds and peak memory:

    frames       features          zq             run
    100,000      3 s,   170 MB     2 s, 208 MB     17 s,   830 MB
    500,000      7 s,   272 MB     2 s, 238 MB     49 s, 1,740 MB
    5,000,000   68 s, 1,470 MB     5 s, 588 MB    309 s, 11,589 MB

The features of 5,000,000 frames are a file of 3,080 MB that is mapped, not read: most of the memory of `run` is its
pages, which the system takes back when it needs them.
"""
import argparse, json, os, resource, shutil, subprocess, sys, tempfile, time
from pathlib import Path

for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS', 'NUMBA_NUM_THREADS'): os.environ[name] = '1'
import numpy as np

SMALL = ('--students mlp:martingale --student-option max_epochs=2 --teacher-option n_iterations=100 --baselines '
         'logistic,memory --workers 1 -q').split()


def measured(command, cwd):
    "CPU seconds, seconds and peak memory (MB) of `foldbook ...`, and its last line."
    code = 'import sys; from foldbook.cli import app; app()'
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(['/usr/bin/env', 'python3', '-c', _WATCH, sys.executable, '-c', code, *command], cwd=cwd,
                          capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 1): raise SystemExit(done.stdout + done.stderr)
    return dict(cpu=round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
                seconds=round(time.perf_counter() - start, 1), peak_mb=int(done.stderr.split()[-1])//1024)


# runs a command and prints what its largest process used
_WATCH = ('import resource, subprocess, sys; c = subprocess.run(sys.argv[1:], stderr=subprocess.DEVNULL).returncode; '
          'print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr); sys.exit(c)')


def write_frames(home, n):
    "Three xtc files of n frames in all, and the flags and Q of each."
    import mdtraj as md
    from mdtraj.formats import XTCTrajectoryFile
    from foldbook.data import fetch
    villin = fetch('villin_go', progress=False)
    for name in ('native.pdb', 'model.json'): shutil.copy(villin.topology.parent/name, home/name)
    xyz = [md.load(str(f), top=str(villin.topology)).xyz for f in villin.trajectories]
    for k in range(3):
        with XTCTrajectoryFile(str(home/f't{k}.xtc'), 'w') as f:
            written, i = 0, k
            while written < n//3:
                part = xyz[i % len(xyz)][:n//3 - written]
                at = np.arange(written, written + len(part), dtype=np.int32)
                f.write(part, time=(6.*at).astype(np.float32), step=at)
                written, i = written + len(part), i + 1


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--frames', type=int, nargs='+', default=[100_000, 500_000, 5_000_000])
    parser.add_argument('--keep', type=Path)
    given = parser.parse_args()
    out = Path(__file__).with_suffix('.json')
    rows = json.loads(out.read_text()) if out.exists() else {}
    for n in given.frames:
        home = given.keep or Path(tempfile.mkdtemp())
        home.mkdir(parents=True, exist_ok=True)
        write_frames(home, n)
        files = [f't{k}.xtc' for k in range(3)]
        row = {'features': measured(['features', '--traj', *files, '--top', 'native.pdb', '--out', 'features'], home)}
        for k in range(3):
            Q = np.load(home/'features'/f'{k:03d}.npy', mmap_mode='r')[:, 0].astype(float)
            np.save(home/f'q{k}.npy', Q)
        row['zq'] = measured(['zq', *(f'q{k}.npy' for k in range(3)), '--unfolded', 'r < 0.25', '--folded', 'r > 0.8',
                              '--bootstrap', '0'], home)
        row['run'] = measured(['run', '--traj', *files, '--top', 'native.pdb', '--out', 'run', *SMALL], home)
        rows[str(n)] = row
        for name, r in row.items():
            print(f'{n:>9,} frames  {name:8s}  {r["cpu"]:8.1f} s CPU  {r["seconds"]:8.1f} s  {r["peak_mb"]:6d} MB',
                  flush=True)
        out.write_text(json.dumps(rows, indent=1) + '\n')
        if not given.keep: shutil.rmtree(home)


if __name__ == '__main__': main()
