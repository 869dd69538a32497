"""Energies and forces a CPU second: this book's network against TorchMD-NET's graph network of the same size and its
TensorNet, on the same frames, one thread."""
import time

import torch

from foldbook import cg
from foldbook.base import ANGSTROM
from foldbook.data import fetch
from foldbook.frames import read_trajectory
from foldbook.matching import torchmdnet

BATCH = 32


def rate(network, types, x, mask, repeats=5):
    "Frames with forces a second of this process, the best of some tries."
    best = 0.
    for _ in range(repeats):
        start, n = time.process_time(), 0
        while time.process_time() - start < 0.7:
            cg.energy_and_forces(lambda x: network(types, x, mask), x)
            n += len(x)
        best = max(best, n/(time.process_time() - start))
    return best


def theirs(model, width, layers):
    "A network of TorchMD-NET with the settings of the paper, or None where it is not installed."
    try: return torchmdnet(model, width, layers)
    except ImportError as e: print(e)


def frames(n_beads):
    "Villin near its folding temperature, the first beads of it: half of the frames compact."
    d = fetch('villin_go', progress=False)
    t = read_trajectory(d.trajectories[0], d.topology)
    return torch.from_numpy(t.xyz[::len(t)//BATCH][:BATCH, :n_beads].copy())


if __name__ == '__main__':
    torch.set_num_threads(1)
    peers = {size: {model: theirs(model, **options) for model in ('graph-network', 'tensornet')}
             for size, options in cg.SIZES.items()}
    for n_beads in (10, 35):
        x, mask = frames(n_beads), torch.ones(1, n_beads, dtype=torch.bool)
        types = torch.randint(1, 22, (1, n_beads), generator=torch.Generator().manual_seed(0))
        d = torch.cdist(x, x)[:, *torch.triu_indices(n_beads, n_beads, 1)]
        print(f'{n_beads} beads, batch {BATCH}, {float(((d < 12*ANGSTROM) & (d > 3*ANGSTROM)).float().mean()):.0%} of '
              f'pairs in range')
        for size, options in cg.SIZES.items():
            ours = cg.SchNet(24, **options)
            print(f'  {size}, {sum(p.numel() for p in ours.parameters()):,} parameters: '
                  f'{(a := rate(ours, types, x, mask)):,.0f} frames/s', end='', flush=True)
            for model, network in peers[size].items():
                if network is None: continue
                print(f'; TorchMD-NET {model}, {sum(p.numel() for p in network.parameters()):,}: '
                      f'{(b := rate(network, types, x, mask)):,.0f}, ratio {a/b:.1f}', end='', flush=True)
            print()
