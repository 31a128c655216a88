"""Tests of what lies beside this file.

pytest benchmarks/test_benchmarks.py    (half a minute; needs peft; trl for the example)
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

BENCHMARKS = Path(__file__).resolve().parent
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent)]
import cost  # noqa: E402
import gpu  # noqa: E402
import quality  # noqa: E402

import monkeyjump as mj  # noqa: E402

# ---------- helpers


def rows_of_tokens(count=24):
    """Rows as quality.py reads them, of two tasks and several lengths, with random tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(count):
        length = 3 + number % 5
        ids = torch.randint(1, 60, (length,), generator=generator).tolist()
        task = f"task {number % 2}"
        rows.append({"task": task, "ids": ids, "choices": [61, 62, 63], "gold": number % 3})
    return rows


def narrow_llama():
    """A frozen Llama of two narrow blocks."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).requires_grad_(False)


def one_seed(method, base):
    """What quality.py's seeds stand for: the product, PEFT or cost.py's mixture, for one seed."""
    name, options = quality.parse(method)
    model = copy.deepcopy(base)
    if name == "mj":
        return mj.apply_monkeyjump(model, **options)
    if name == "lora":
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(r=2, lora_alpha=16, target_modules=options["linears"])
        return peft.get_peft_model(model, lora)
    wrapper = {"moe_lora": cost.MoELoRA, "hydra_lora": cost.HydraLoRA}[name]
    cost.wrap(model, options["linears"], wrapper)
    return model


def counterparts(together, model, seed):
    """Pairs of a parameter of one seed's model and the slice that stands for it."""
    owners = dict(model.named_modules())
    for path, stack in together.model.named_modules():
        if isinstance(stack, quality.SeedMixture):
            owner = owners[path]
            yield owner.router.weight, stack.router[seed]
            downs = owner.A if isinstance(owner.A, torch.nn.ParameterList) else [owner.A]
            yield from zip(downs, stack.A[seed], strict=True)
            yield from zip(owner.B, stack.B[seed], strict=True)
        elif isinstance(stack, quality.SeedLoRA):
            owner = owners.get(f"base_model.model.{path}") or owners[path]
            names = dict(owner.named_parameters())
            down = next(p for name, p in names.items() if "lora_A" in name)
            up = next(p for name, p in names.items() if "lora_B" in name)
            yield down, stack.A[seed]
            yield up, stack.B[seed]


def centers_of(model):
    """The centers of each block, in order."""
    return [buffer for name, buffer in model.named_buffers() if name.endswith("centers")]


class OwnTraining:
    """quality.py's protocol for one seed, on a model of its own."""

    def __init__(self, model, steps, rate):
        self.model = model.train()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=rate, weight_decay=0.0)
        warm = max(1, steps // 20)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda s: min((s + 1) / warm, (steps - s) / max(1, steps - warm))
        )

    def logits(self, rows):
        """Of the last position [B, vocabulary]."""
        batch = quality.collate(rows, "cpu")
        return self.model(**batch, use_cache=False).logits[:, -1]

    def step(self, rows):
        """The loss of one training step."""
        gold = torch.tensor([row["choices"][row["gold"]] for row in rows])
        loss = F.cross_entropy(self.logits(rows), gold)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return loss.detach()


    @torch.no_grad()
    def figures(self, rows):
        """nll of the right choice among the choices, and accuracy."""
        self.model.eval()
        log_p = self.logits(rows)[:, [61, 62, 63]].log_softmax(dim=-1)
        gold = torch.tensor([row["gold"] for row in rows])
        right = (log_p.argmax(dim=-1) == gold).float()
        return F.nll_loss(log_p, gold).item(), 100 * right.mean().item()


def own_training(together, method, base, index):
    """The training of one of the seeds on a model of its own, from the same start."""
    model = one_seed(method, base)
    for parameter, piece in counterparts(together, model, index):
        parameter.data.copy_(piece.detach())
    for centers, router in zip(centers_of(model), together.routers, strict=True):
        centers.copy_(router.centers[index])
    return OwnTraining(model, steps=4, rate=0.03)


# ---------- the tests


def test_a_stacked_mixture_of_lora_experts_is_the_loop_with_its_gradients():
    torch.manual_seed(0)
    base = torch.nn.Linear(12, 20)
    loop = cost.MoELoRA(base)
    stacked = cost.StackedMoELoRA(base)
    for B in loop.B:
        torch.nn.init.normal_(B)
    stacked.take(loop)
    x = torch.randn(3, 5, 12)
    torch.testing.assert_close(stacked(x), loop(x))
    weight = torch.randn(3, 5, 20)
    (stacked(x) * weight).sum().backward()
    (loop(x) * weight).sum().backward()
    torch.testing.assert_close(stacked.router.weight.grad, loop.router.weight.grad)
    torch.testing.assert_close(stacked.A.grad, torch.cat([A.grad for A in loop.A]))
    torch.testing.assert_close(stacked.B.grad, torch.cat([B.grad for B in loop.B], dim=1))


@pytest.mark.parametrize("system", ["lora", "PEFT LoRA", "MoE-LoRA", "MoE-LoRA stacked"])
def test_a_system_of_the_costs_shares_the_frozen_weights_and_trains_its_adapters(system):
    pytest.importorskip("peft")
    base = narrow_llama()
    trained = cost.System(system, base).trained
    frozen = {p.data_ptr() for p in base.parameters()}
    assert trained
    assert all(p.data_ptr() not in frozen for p in trained)
    assert frozen <= {p.data_ptr() for p in cost.build(system, base).parameters()}


def test_launches_leave_out_what_starts_no_kernel():
    with cost.CountLaunches() as counter:
        x = torch.empty(4, 4).detach().view(2, 8).t()
        (x + x).sum()
    assert dict(counter.calls) == {"add": 1, "sum": 1}


@pytest.mark.parametrize(
    "method",
    [
        "mj linears=q,k,v,o top_k=2 temperature=0.2",
        "mj linears=up,down shared_expert=q,k,v,o top_k=1 rep_mode=mean ema_momentum=0.5",
        "lora linears=q,v,down",
        "moe_lora linears=q,up",
        "hydra_lora linears=q,down",
    ],
)
def test_seeds_trained_at_once_are_each_the_products_own_training_step_by_step(method):
    base = narrow_llama()
    rows = rows_of_tokens()
    seeds = [3, 4]
    together = quality.SeededModel(method, base, seeds, steps=4, rate=0.03)
    batches = [quality.training_batches(rows, 4, 4, seed) for seed in seeds]
    if together.routers:
        together.init_centers(batches, subset_size=40)
    alone = [own_training(together, method, base, index) for index in range(len(seeds))]
    for rows_by_seed in zip(*batches, strict=True):
        right = [one.step(rows) for one, rows in zip(alone, rows_by_seed, strict=True)]
        losses = together.step(quality.joined(rows_by_seed))
        torch.testing.assert_close(losses, torch.stack(right), rtol=1e-4, atol=0)
    for index, one in enumerate(alone):
        for parameter, piece in counterparts(together, one.model, index):
            assert (piece - parameter).norm() < 1e-3 * parameter.norm()  # AdamW enlarges rounding
        for centers, router in zip(centers_of(one.model), together.routers, strict=True):
            torch.testing.assert_close(router.centers[index], centers, rtol=1e-4, atol=1e-5)
    for one, found in zip(alone, quality.evaluate(together, rows), strict=True):
        nll, accuracy = one.figures(rows)
        assert found["nll"] == pytest.approx(nll, abs=1e-3)
        assert found["mean"] == pytest.approx(accuracy, abs=1e-3)


def test_k_means_for_several_seeds_is_that_of_each_alone():
    method = "mj linears=q,k,v,o top_k=2"
    base = narrow_llama()
    rows = rows_of_tokens()
    seeds = [3, 4]
    together = quality.SeededModel(method, base, seeds, steps=4, rate=0.03)
    batches = [quality.training_batches(rows, 4, 4, seed) for seed in seeds]
    together.init_centers(batches, subset_size=40)
    for index, seed in enumerate(seeds):
        model = one_seed(method, base)
        loader = [quality.collate(batch, "cpu") for batch in batches[index]]
        mj.init_router_centers(model, loader, subset_size=40, seed=seed)
        for centers, router in zip(centers_of(model), together.routers, strict=True):
            torch.testing.assert_close(router.centers[index], centers, rtol=1e-4, atol=1e-5)


def test_everything_for_a_gpu_runs_small_on_a_cpu_and_names_what_needs_cuda(tmp_path):
    pytest.importorskip("peft")
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--tiny", "--out", str(tmp_path / "gpu")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    outcomes = {(row["part"], row["what"]): row["outcome"] for row in found["rows"]}
    assert {part for part, _ in outcomes} == {"promises", "costs", "targets", "compiled", "example"}
    if found["card"] == "no GPU":
        assert outcomes["promises", "two devices, after apply"] == "skipped: needs CUDA"
    assert (tmp_path / "gpu.md").read_text().count("\n|") > len(outcomes)


def test_a_part_that_fails_is_named_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    ran = []

    def broken(setting, report):
        """A part that fails."""
        raise RuntimeError("no such kernel")

    parts = {"promises": broken, "costs": lambda setting, report: ran.append("costs")}
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--out", str(tmp_path / "gpu")])
    assert gpu.main() == 1
    assert ran == ["costs"]
    assert "FAILED: RuntimeError: no such kernel" in capsys.readouterr().out
