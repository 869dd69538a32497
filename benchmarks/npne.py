"""Time of one iteration of the nonparametric committor on 1e5 frames and 28 basis functions, one thread.

The peer, optimalrcs (TensorFlow), needed 37 to 42 ms of processor time on a comparable machine; a plain numpy version
is timed beside it here.
Run: python benchmarks/npne.py
"""
import os
os.environ.setdefault('OMP_NUM_THREADS', '1')
import time

import numpy as np

from foldbook.npne import NonparametricCommittor
from foldbook.systems import lshape2d

PEER_MS = 37., 42.


def numpy_iteration(y, r, flags, centre, gamma=0.2, degree=6):
    "The same equations with whole arrays."
    g = np.where(flags < 0, 1 / (1 + np.exp(np.clip(-(r - centre) * 100, -50, 50))), 0)
    z = 2 * r - 1
    f = np.stack([g * y**i * z**j for i in range(degree + 1) for j in range(degree + 1 - i)])
    right = np.zeros_like(f)
    right[:, :-1] = f[:, 1:] - f[:, :-1]
    right -= gamma * f
    alpha = np.linalg.lstsq(f @ right.T, -f[:, :-1] @ np.diff(r), rcond=None)[0]
    return np.clip(r + alpha @ f, 0, 1)


def main(n_frames=100_000, n_iterations=200):
    s = lshape2d()
    x, states, _ = s.observe(s.sample(n_frames, seed=0))
    rng = np.random.default_rng(0)
    x = [np.column_stack([x[0], x[0].sum(1), x[0][:, 0] - x[0][:, 1],
                          rng.normal(size=(n_frames, 2))]).astype(np.float32)]
    print(f'{n_frames} frames, {np.mean(states[0] < 0):.0%} interior, 28 basis functions; milliseconds of processor '
          f'time per iteration')
    for method in ('NPNEq', 'NPq'):
        def fit(n, method=method):
            NonparametricCommittor(method, n_iterations=n, history=(0,), guard=0).fit(x, states, progress=False)
        fit(2)  # compile
        base = time.process_time()
        fit(2)
        base = time.process_time() - base
        start = time.process_time()
        fit(n_iterations)
        ms = 1e3 * (time.process_time() - start - base) / (n_iterations - 2)
        print(f'{method:6} {ms:6.2f} ms; peer/foldbook = {PEER_MS[0] / ms:.1f} to {PEER_MS[1] / ms:.1f}')
    y, r = x[0][:, 0] / np.abs(x[0][:, 0]).max(), np.where(states[0] < 0, 0.5, states[0])
    start = time.process_time()
    for _ in range(5): r = numpy_iteration(y, r, states[0], 0.)
    plain = 1e3 * (time.process_time() - start) / 5
    print(f'numpy  {plain:6.2f} ms; numpy/foldbook = {plain / ms:.1f}')


if __name__ == '__main__': main()
