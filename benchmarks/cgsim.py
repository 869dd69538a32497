"""Steps of 32 replicas a CPU second: one batch against a loop over replicas, as torchmd does it, with the same
energies, one thread."""
import math
import time
from functools import partial

import torch

from foldbook import cg
from foldbook.base import BOLTZMANN
from foldbook.cgsim import Langevin, RunOptions

REPLICAS, OPTIONS = 32, RunOptions(time_step=0.002)


def loop(potential, names, x, n_steps, o=OPTIONS):
    "The same BAOAB, one replica after the other in each step."
    system, keep, kT = potential.system(names), math.exp(-o.friction*o.time_step), BOLTZMANN*o.temperature
    v = (kT/o.mass)**0.5*torch.randn(x.shape)
    f = torch.cat([potential.forces(x[k:k+1], system)[1] for k in range(len(x))])
    for _ in range(n_steps):
        v = v + o.time_step/2/o.mass*f
        x = x + o.time_step/2*v
        v = keep*v + ((1 - keep**2)*kT/o.mass)**0.5*torch.randn(x.shape)
        x = x + o.time_step/2*v
        f = torch.cat([potential.forces(x[k:k+1], system)[1] for k in range(len(x))])
        v = v + o.time_step/2/o.mass*f
    return x


def rate(step, n, tries=3):
    "Replica-steps a second of this process, the best of some tries."
    best = 0.
    for _ in range(tries):
        start = time.process_time()
        step(n)
        best = max(best, REPLICAS*n/(time.process_time() - start))
    return best


if __name__ == '__main__':
    torch.set_num_threads(1)
    prior = cg.Prior({'*': (30_000., 0.382)}, {'*': 0.008}, dihedrals={'*': cg.PAPER_DIHEDRAL},
                     damping=0.1)
    for protein, n in (('chignolin', 10), ('villin', 35)):
        x = torch.tensor([[0.3*k, 0.24*(k % 2), 0.05*math.sin(k)] for k in range(n)]).repeat(REPLICAS, 1, 1)
        names = ('ALA',)*n
        for label, network in (('prior', None), ('prior and network 32x2', cg.SchNet(22, **cg.SIZES['32x2']))):
            p = cg.Potential(prior, cg.TABLES['protein-thermodynamics'], network)
            s = Langevin(p, [names]*REPLICAS, x, OPTIONS)
            batch, one = rate(s.advance, 100), rate(partial(loop, p, names, x), 6)
            print(f'{protein}, {n} beads, {label}: batch of {REPLICAS} {batch:,.0f} replica-steps/s, loop over '
                  f'replicas {one:,.0f}, ratio {batch/one:.1f}')
