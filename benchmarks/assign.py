"""An experiment, `assign=m` of quality.py: gradients decide which center serves which expert.

Needs `pip install scipy`. What came of it is in quality.md.
"""

import quality
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import monkeyjump as mj


def assign_centers(model: nn.Module, batches: list[tuple[dict, Tensor]]) -> None:
    """Give each expert the center whose tokens would change it most, judged by the gradient at initialisation.

    k-means numbers its clusters by chance, so chance decides which tokens use which projection's adapter. Here
    M[e, c] is the L1 norm of the gradient of B_e summed over the tokens of cluster c (the gates play no part in it:
    while B = 0, dL/dy is that of the base model); each row is divided by its sum, and the assignment of centers to
    experts with the largest total is taken.
    """
    centers, nearest, hooks = quality.watch_clusters(model)
    parameters = dict(model.named_parameters())
    gradients: dict[tuple[str, str], Tensor] = {}  # (block, expert) -> gradient of B by cluster, [E, out, r]

    def watch(block: str, expert: str):
        path = f"{block}.{expert}"
        A = next(p for name, p in parameters.items() if name.startswith(f"{path}.") and name.endswith("lora_A"))

        def hook(_, args: tuple, output: Tensor) -> None:
            inner = args[0].detach().float() @ A.detach().T  # [B, T, r]
            mine = F.one_hot(nearest[block], len(centers[block])).float()  # [B, T, E]

            def collect(gradient: Tensor) -> None:  # [B, T, out]; zero at padding
                by_cluster = torch.einsum("bte,bto,btr->eor", mine, gradient.float(), inner)
                gradients[block, expert] = gradients.get((block, expert), 0) + by_cluster

            output.register_hook(collect)

        return model.get_submodule(path).register_forward_hook(hook)

    experts = {block: block_statistics["experts"] for block, block_statistics in mj.router_statistics(model).items()}
    hooks += [watch(block, expert) for block, names in experts.items() for expert in names]
    model.eval()  # no jitter, and nothing is gathered for the moving average
    for inputs, gold in batches:
        F.cross_entropy(model(**inputs).logits[:, -1].float(), gold).backward()
    model.zero_grad()
    for hook in hooks:
        hook.remove()
    for block, names in experts.items():
        M = torch.stack([gradients[block, expert].abs().sum(dim=(1, 2)) for expert in names])  # [E experts, E clusters]
        _, chosen = linear_sum_assignment((M / M.sum(dim=1, keepdim=True)).cpu().numpy(), maximize=True)
        centers[block].copy_(centers[block][torch.as_tensor(chosen)].clone())
