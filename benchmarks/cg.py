"Energies and forces a CPU second: this book's network against TorchMD-NET's graph network of the same size, on the same frames, one thread."
import time

import torch

from foldbook import cg
from foldbook.data import fetch
from foldbook.sources import ANGSTROM

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


def graph_network(width, layers):
    "TorchMD-NET's graph network with the settings of the paper, or None where it is not installed."
    try: from torchmdnet.models.model import create_model
    except ImportError: return None
    return cg.TorchMDNet(create_model(dict(
        model='graph-network', embedding_dimension=width, num_layers=layers, num_rbf=18, rbf_type='expnorm', trainable_rbf=True, activation='tanh', neighbor_embedding=False,
        cutoff_lower=3., cutoff_upper=12., max_z=25, max_num_neighbors=64, aggr='add', derivative=False, atom_filter=-1, prior_model=None, output_model='Scalar', reduce_op='sum', precision=32,
        equivariance_invariance_group='O(3)', box_vecs=None, check_errors=True, static_shapes=False, vector_cutoff=False)))


def frames(n_beads):
    "Villin near its folding temperature, the first beads of it: half of the frames compact."
    import mdtraj as md
    d = fetch('villin_go', progress=False)
    t = md.load(str(d.trajectories[0]), top=str(d.topology))
    return torch.from_numpy(t.xyz[::len(t)//BATCH][:BATCH, :n_beads].copy())


if __name__ == '__main__':
    torch.set_num_threads(1)
    for n_beads in (10, 35):
        x, mask = frames(n_beads), torch.ones(1, n_beads, dtype=torch.bool)
        types = torch.randint(1, 22, (1, n_beads), generator=torch.Generator().manual_seed(0))
        near = float(((torch.cdist(x, x) < 12*ANGSTROM) & (torch.cdist(x, x) > 3*ANGSTROM)).float().mean())
        for size, options in cg.SIZES.items():
            ours, theirs = cg.SchNet(24, **options), graph_network(**options)
            a = rate(ours, types, x, mask)
            print(f'{n_beads} beads, batch {BATCH}, {near:.0%} of pairs in range, {size}, {sum(p.numel() for p in ours.parameters()):,} parameters: {a:,.0f} frames/s', end='')
            if theirs is None: print('; TorchMD-NET is not installed')
            else: print(f'; TorchMD-NET, {sum(p.numel() for p in theirs.parameters()):,} parameters: {(b := rate(theirs, types, x, mask)):,.0f} frames/s, ratio {a/b:.1f}')
