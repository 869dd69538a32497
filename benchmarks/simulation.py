"""What a simulation costs: folding events a CPU-minute of the model, and what `simulate` adds to plain OpenMM.

The peer is OpenMM itself, stepped without checkpoints, checks or files; the overhead is the ratio of the two. Times
are of one thread's processor. The prototype of the structure-based model reached 28 transitions a CPU-minute with
OpenMM on an AMD EPYC core. Run: python benchmarks/simulation.py
"""
import os
os.environ.setdefault('OMP_NUM_THREADS', '1')
import tempfile
import time
from pathlib import Path

import mdtraj as md

from foldbook.allatom import AtomicModel, prepared, speed
from foldbook.data import fetch
from foldbook.go import native_fraction, passage_times, shipped_model
from foldbook.engine import simulate
from foldbook.molecules import load_molecule, peptide

PROTOTYPE = 28


def cpu(run):
    start = time.process_time()
    run()
    return time.process_time() - start


def overhead(model, steps, n_frames, seconds=3.0):
    "Processor time of `simulate` over that of the bare steps."
    with tempfile.TemporaryDirectory() as tmp:
        ours = cpu(lambda: simulate(model, Path(tmp)/'a.xtc', n_frames, steps, seed=1, progress=False))
    return ours*speed(model, seconds)/(steps*n_frames)


def transitions_per_minute(name='villin_go'):
    model, data = shipped_model(name), fetch(name, progress=False)
    q = [native_fraction(model, md.load(str(p), top=str(data.topology)).xyz) for p in data.trajectories]
    events = sum(sum(map(len, passage_times(x))) + 1 for x in q)
    per_step = events/(sum(map(len, q))*data.frame_spacing_ps/model.time_step)
    return 60*speed(model, 5.0)*per_step


def main():
    rate = transitions_per_minute()
    print(f'villin, structure-based: {rate:.1f} transitions a CPU-minute; prototype/foldbook = {PROTOTYPE/rate:.2f}')
    print(f'villin, a frame each 1500 steps: simulate/OpenMM = {overhead(shipped_model(), 1500, 250):.3f}')
    with tempfile.TemporaryDirectory() as tmp:
        for name, molecule, steps, n in (('alanine dipeptide', peptide('A'), 500, 250),
            ('CLN025', load_molecule(fetch('cln025_implicit', progress=False).directory/'native.pdb'), 50, 100)):
            model = prepared(AtomicModel(molecule, 'ff14SB', 'obc2'), Path(tmp)/name)
            print(f'{name}, a frame each {steps} steps: simulate/OpenMM = {overhead(model, steps, n):.3f}')


if __name__ == '__main__': main()
