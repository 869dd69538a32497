"""Seconds for Z_q at 16 lags on one core, against the same sums in plain numpy.

Run with `python benchmarks/zq.py` (about a minute; `--frames 1000000` for a short one). Each part runs in a process of
its own, so that its memory can be read off the operating system. The best of three runs is printed, as time on the
clock and as time on the processor (the two differ when the machine has other work); the ratio compares processor
times. The implementations must agree to 1e-9. Before that, the time of `import foldbook.zq` and of
`import foldbook.verdicts` is measured: both judge a coordinate, and should take less than half a second.
"""
import argparse, json, os, resource, subprocess, sys, tempfile, time

for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS', 'NUMBA_NUM_THREADS'): os.environ[name] = '1'
import numpy as np

LAGS = 2 ** np.arange(16)


def numpy_boundaries(flags):
    """Index of the last boundary frame strictly before each frame and of the first strictly after; -1 and T where
    there is none."""
    n, t = len(flags), np.arange(len(flags))
    previous = np.maximum.accumulate(np.where(flags >= 0, t, -1))
    following = np.minimum.accumulate(np.where(flags >= 0, t, n)[::-1])[::-1]
    return np.r_[-1, previous[:-1]], np.r_[following[1:], n]


def numpy_zq(r, flags, lags, n_bins=1000):
    "Z_q of one trajectory at every lag, item by item, with whole-array operations."
    n = len(r)
    previous, following = numpy_boundaries(flags)
    bins = np.minimum((np.maximum(r, 0) * n_bins).astype(np.int32), n_bins)
    inside, zq = np.flatnonzero(flags < 0), np.empty((len(lags), n_bins))
    cross = np.flatnonzero((flags >= 0) & (following < n))
    cross = cross[r[following[cross]] != r[cross]]
    for i, k in enumerate(lags):
        t = inside[inside < n - k]
        h = np.bincount(bins[t], r[np.minimum(t + k, following[t])] - r[t], n_bins + 1)
        t = inside[inside >= k]
        t = t[(previous[t] >= 0) & (t - previous[t] <= k)]
        h += np.bincount(bins[previous[t]], r[t] - r[previous[t]], n_bins + 1)
        p = cross[following[cross] - cross <= k]
        h += np.bincount(bins[p], (k - following[p] + p + 1) * (r[following[p]] - r[p]), n_bins + 1)
        zq[i] = np.cumsum(h)[:n_bins] / k
    return zq


def sample(n_frames):
    "Exact committor of the double well, jittered between the states so that its values are continuous."
    from foldbook.systems import dw1d
    system = dw1d()
    path = system.sample(n_frames, seed=0)[0]
    r, flags = system.committor[path], system.states[path]
    jitter = np.random.default_rng(0).normal(0, 1e-3, n_frames)
    return np.where(flags < 0, np.clip(r + jitter, 0, 1), r), flags


def resident():
    "Peak resident memory of this process, bytes."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def current():
    "Resident memory of this process now, bytes."
    return int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def foldbook_zq(r, flags):
    "Z_q and Z_C1 at every lag."
    from foldbook.zq import cut_profiles
    return cut_profiles(r, flags, LAGS).zq


def foldbook_profile(r, flags):
    "The same with a verdict."
    from foldbook.verdicts import profile
    return profile(r, flags, LAGS).zq


FUNCTIONS = {'numpy': lambda r, flags: numpy_zq(r, flags, LAGS), 'cut_profiles': foldbook_zq,
             'profile': foldbook_profile}


def measure(what, n_frames):
    "Write the series to a file and start afresh, so that making it leaves no trace in the memory measured."
    r, flags = sample(n_frames)
    path = os.path.join(tempfile.gettempdir(), f'foldbook_zq_{os.getpid()}.npz')
    np.savez(path, r=r, flags=flags)
    os.execv(sys.executable, [sys.executable, __file__, '--timed', what, path])


def timed(what, path):
    "Load the series, run three times; wall and CPU seconds of the best, memory above the input, part of the profile."
    data = np.load(path)
    r, flags = data['r'], data['flags']
    os.remove(path)
    FUNCTIONS[what](r[:100_000], flags[:100_000])  # compile
    before, found = current(), []
    for _ in range(3):
        wall, cpu = time.perf_counter(), time.process_time()
        z = FUNCTIONS[what](r, flags)
        found.append((time.process_time() - cpu, time.perf_counter() - wall))
    print(json.dumps({'cpu': min(found)[0], 'wall': min(f[1] for f in found), 'bytes': (resident() - before) / len(r),
                      'z': z[::5, ::50].tolist()}))


def run(*args):
    "Run this file in a process of its own and read its answer."
    out = subprocess.run([sys.executable, __file__, *map(str, args)], capture_output=True, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


HEAVY = ('torch', 'lightning', 'pandas', 'sklearn', 'mdtraj', 'matplotlib')


def import_seconds(module):
    "Clock and CPU time of an import in a fresh interpreter, best of three, and which heavy libraries it loads."
    code = (f'import time, sys; t, c = time.perf_counter(), time.process_time(); import {module}; '
            f'print(time.perf_counter() - t, time.process_time() - c, *[m for m in {HEAVY} if m in sys.modules])')
    found = [subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
             for _ in range(3)]
    return min(float(f[0]) for f in found), min(float(f[1]) for f in found), found[0][2:]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--frames', type=int, nargs='+', default=[10**6, 10**7])
    parser.add_argument('--measure', nargs=2, help=argparse.SUPPRESS)
    parser.add_argument('--timed', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure: return measure(args.measure[0], int(args.measure[1]))
    if args.timed: return timed(*args.timed)
    print(f'{os.getloadavg()[0]:.1f} processes on {os.cpu_count()} cores')
    for module in ('foldbook.zq', 'foldbook.verdicts'):
        clock, cpu, heavy = import_seconds(module)
        print(f'import {module}: {clock:.2f} s by the clock, {cpu:.2f} s of CPU, loads {", ".join(heavy) or "none"} of '
              f'{", ".join(HEAVY)}')
    print(f'{"frames":>10} {"":<34} {"clock s":>8} {"CPU s":>8} {"CPU ns/frame/lag":>17} {"B/frame":>8} '
          f'{"numpy / this":>13}')
    for n in args.frames:
        found = {what: run('--measure', what, n) for what in FUNCTIONS}
        for what, text in zip(FUNCTIONS, ('plain numpy, Z_q only', 'foldbook, Z_q + Z_C1 + delta r^2', 'foldbook, the '
                                          'same with a verdict')):
            f = found[what]
            assert np.allclose(f['z'], found['numpy']['z'], atol=1e-6, rtol=1e-9), f'{what} differs from numpy'
            print(f'{n:>10} {text:<34} {f["wall"]:8.3f} {f["cpu"]:8.3f} {f["cpu"] / n / len(LAGS) * 1e9:17.2f} '
                  f'{f["bytes"]:8.0f} {found["numpy"]["cpu"] / f["cpu"]:13.1f}')


if __name__ == '__main__': main()
