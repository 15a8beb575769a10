"""A machine for PTX: runs the Hopper kernels that JAX compiles, on the CPU, and checks the laws of the hardware.

    from experiments.ptx_machine import Schedule, kernels_on_the_machine

    with kernels_on_the_machine(Schedule(seed=1, apart=True, late=False)) as session:
        y = np.asarray(expert_mlp(..., implementation="mosaic_gpu"))
    print(session.ran)

What the Pallas interpreter does not model is here: clusters and multicast, proxies, registers that a running wgmma
still uses, shared memory as addresses and swizzles. Each kernel is compiled for an abstract H100; threads run in
lockstep, a warpgroup or a warp at a time; warps, copies and stores take turns at random; memory that nothing wrote is
NaN. Whatever breaks a law raises the exception of that law (`laws.py`), with the kernel and the line of its PTX. One
law is about indices that Mosaic drops, so that no PTX shows them: kernels are compiled with a check (`unseen.py`). An
instruction that the machine does not know raises too.

Not modelled:
  - time, caches, numbers of registers (`setmaxnreg`), and so everything about speed;
  - that a read of the generic proxy, or a write, comes before a copy overwrites the same bytes without a proxy fence:
    a barrier is held to be enough, as CUTLASS holds it;
  - weak memory: a race is an error, and without one memory is sequentially consistent;
  - order between clusters: there is none, and bytes that two of them share, one writing, are a race. Atomics and
    reductions in memory are not known;
  - threads of a warp that part: a branch within a warp is an error, though the hardware allows some of them;
  - stores of equal values by several warps, which formally race: Mosaic stores so what it holds several times;
  - bytes by themselves: accesses are watched in pieces of two;
  - copies of shared memory between blocks, and loads and stores of another block's: not known;
  - ptxas: it may insert fences that the PTX lacks, or reorder what the PTX does not order;
  - approximations of the special function unit, which are exact, and fma, which rounds twice.
"""

from experiments.ptx_machine.launch import Descriptor, Launch, Pointer
from experiments.ptx_machine.laws import LawBroken
from experiments.ptx_machine.machine import Machine, Schedule
from experiments.ptx_machine.session import Session, kernels_on_the_machine

__all__ = [
    "Descriptor",
    "Launch",
    "LawBroken",
    "Machine",
    "Pointer",
    "Schedule",
    "Session",
    "kernels_on_the_machine",
]
