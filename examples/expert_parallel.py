"""A mixture-of-experts layer over several ranks: threads of this process, or under torchrun one process a GPU.

python examples/expert_parallel.py                              # four ranks on the CPU
torchrun --nproc-per-node 2 examples/expert_parallel.py        # two GPUs
"""

import os
from concurrent.futures import ThreadPoolExecutor

import phalanx
import torch

HIDDEN, EXPERTS, TOPK, TOKENS = 256, 16, 4, 32


def layer(group: phalanx.Group) -> None:
    """Expert e multiplies its tokens by e + 1, so that the result is known."""
    device = torch.device(group.device)
    ep = phalanx.ExpertParallel(
        group, hidden=HIDDEN, num_experts=EXPERTS, topk=TOPK, max_tokens=TOKENS, dtype="bf16", num_sms=8
    )
    generator = torch.Generator().manual_seed(group.rank)
    x = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16().to(device)
    weights, experts = (t.to(device) for t in torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOPK))

    rows, _, counts, _, handle = ep.dispatch(x, experts, weights)
    factors = torch.arange(ep.num_local_experts, device=device) + ep.first_local_expert + 1
    rows = rows * torch.repeat_interleave(factors, counts)[:, None].bfloat16()
    out = ep.combine(rows, handle, tokens=len(x))

    exact = x.float() * (weights * (experts + 1)).sum(1, keepdim=True)
    error = ((out.float() - exact).norm() / exact.norm()).item()
    print(f"{group}: {len(rows)} rows for experts {ep.first_local_expert} and up, {error:.2%} from FP32")
    assert error < 0.01


def main() -> None:
    if "RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl")
        layer(phalanx.Group.from_torch())
        torch.distributed.destroy_process_group()
        return
    groups = phalanx.Group.local(4)
    with ThreadPoolExecutor(len(groups)) as threads:
        list(threads.map(layer, groups))  # raises what a rank has raised


if __name__ == "__main__":
    main()
