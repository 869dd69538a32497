"Frames a second of the default features, streamed in chunks, against the same numbers from mdtraj with the whole file in memory."
import time

import mdtraj as md
import numpy as np

from foldbook.data import fetch
from foldbook.features import ca_atoms, default, load_native, model_contacts, stream


def plain(path, native, pairs):
    "The same columns, written out with mdtraj."
    t = md.load(str(path), top=native.topology)
    d0, d = (md.compute_distances(x, pairs, periodic=False) for x in (native, t))
    soft = np.exp(-0.5*(np.maximum(d - d0, 0)/0.1)**2)
    ends = md.compute_distances(t, [[0, native.n_atoms - 1]], periodic=False)
    return np.c_[(d < 1.2*d0).mean(1), md.rmsd(t, native), md.compute_rg(t), ends, soft, d]


if __name__ == '__main__':
    villin = fetch('villin_go')
    native, pairs, path = load_native(villin.topology), model_contacts(villin.topology), villin.trajectories[0]
    assert len(ca_atoms(native.topology)) == native.n_atoms
    times = {}
    for name, task in (('streamed', lambda: stream(path, villin.topology, default(native, pairs), progress=False)[0][0]), ('mdtraj', lambda: plain(path, native, pairs))):
        task()
        start = time.perf_counter()
        result = task()
        times[name] = time.perf_counter() - start
        print(f'{name:9} {len(result)/times[name]:9.0f} frames/s, {result.shape[1]} columns')
    print(f'ratio of times, streamed / mdtraj: {times["streamed"]/times["mdtraj"]:.2f}')
