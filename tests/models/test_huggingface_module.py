"""CausalLM against the losses and gradients of transformers' own models."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_sentinel import SentinelStrategy, cli
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.models import CausalLM, causal_lm_layers, router_loss, save_pretrained, tokens_and_mask
from tests.models.families import CONFIGS, MIXTURES, VOCABULARY, config, padded, tokens, unsplit

ROUTED = {"output_router_logits": True, "router_aux_loss_coef": 0.5}


def module(family: str, **others: Any) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(config(family, **others)).eval()
    model.configure_model()
    return model


def test_layers_are_built_when_they_are_wanted() -> None:
    model = CausalLM(config("gpt2")).eval()
    assert not list(model.parameters())
    torch.manual_seed(0)
    assert torch.equal(model(tokens()), unsplit("gpt2").eval()(tokens()).logits)
    weights = list(model.parameters())
    model.configure_model()
    assert all(mine is before for mine, before in zip(model.parameters(), weights, strict=True))
    with pytest.raises(AttributeError, match="no attribute 'nets'"):
        model.nets  # noqa: B018


class Frozen(CausalLM):
    def configure_model(self) -> None:
        super().configure_model()
        self.net[0].requires_grad_(False)


def test_layers_may_be_changed_where_they_are_built() -> None:
    model = copy.deepcopy(pickle.loads(pickle.dumps(Frozen(config("llama")))))
    assert not list(model.parameters())
    assert [all(p.requires_grad for p in layer.parameters()) for layer in model.net] == [False, True, True, True, True, True]


def gradients(model: CausalLM) -> dict[str, Tensor | None]:
    return {
        f"{path}.{name}": p.grad
        for layer in model.net
        for part, path in layer.parts.items()
        for name, p in getattr(layer, part).named_parameters()
    }


def assert_same_gradients(model: CausalLM, whole: torch.nn.Module) -> None:
    found = gradients(model)
    for name, parameter in whole.named_parameters():
        assert (found[name] is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("side", ["none", "left", "both"])
def test_loss_and_gradients_equal_the_unsplit_models(family: str, side: str) -> None:
    routed = ROUTED if family in MIXTURES else {}
    model, whole = module(family, **routed), unsplit(family, **routed).eval()
    input_ids, mask = padded(side)
    batch = {"input_ids": input_ids} if side == "none" else {"input_ids": input_ids, "attention_mask": mask}
    loss = model.training_step(batch, 0)
    labels = input_ids.masked_fill(mask == 0, -100)
    expected = whole(**batch, labels=labels)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-6, atol=0)
    loss.backward()
    expected.loss.backward()
    assert_same_gradients(model, whole)


@pytest.mark.parametrize("family", MIXTURES)
def test_the_router_loss_alone_equals_the_unsplit_models(family: str) -> None:
    model, whole = module(family, **ROUTED), unsplit(family, **ROUTED).eval()
    input_ids, mask = padded("both")
    routed = model.net(tokens_and_mask(input_ids, mask))[..., VOCABULARY:]
    found = router_loss(routed, mask, model.config.num_experts_per_tok)
    expected = whole(input_ids, attention_mask=mask).aux_loss
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    found.backward()
    expected.backward()
    for name, gradient in gradients(model).items():
        parameter = whole.get_parameter(name)
        if parameter.grad is None:
            # What has no part in it, such as the head, gets none or zeros.
            assert gradient is None or not gradient.any(), name
        else:
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_all_tokens_at_one_expert_cost_the_number_of_experts() -> None:
    routed = torch.tensor([1.0, 0, 0, 0, 1, 0, 0, 0]).expand(2, 5, 8)
    assert router_loss(routed, None, top_k=1).item() == 4.0
    assert router_loss(routed, torch.zeros(2, 5), top_k=1).item() == 0.0


@pytest.mark.parametrize("family", MIXTURES)
def test_without_a_router_loss_nothing_of_routers_travels(family: str) -> None:
    model = module(family)
    assert model.net[0](tokens()).shape[-1] == 33
    assert model.net(tokens()).shape[-1] == VOCABULARY
    assert module(family, **ROUTED).net[0](tokens()).shape[-1] == 33 + 2 * 4


def test_labels_are_predicted_where_they_are_given() -> None:
    model, input_ids = module("llama"), tokens()
    labels = input_ids.clone()
    labels[:, :8] = -100
    loss = model.training_step({"input_ids": input_ids, "labels": labels}, 0)
    torch.testing.assert_close(loss, unsplit("llama").eval()(input_ids, labels=labels).loss, rtol=1e-6, atol=0)


def test_a_batch_with_nothing_to_predict_costs_nothing() -> None:
    model, input_ids = module("llama"), tokens()
    loss = model.training_step({"input_ids": input_ids, "labels": torch.full_like(input_ids, -100)}, 0)
    loss.backward()
    assert loss.item() == 0.0
    assert all(not p.grad.any() for p in model.parameters())


def test_predictions_are_logits() -> None:
    input_ids, mask = padded("left")
    model = module("qwen3_moe", **ROUTED)
    predicted = model.predict_step({"input_ids": input_ids, "attention_mask": mask}, 0)
    assert torch.equal(predicted, unsplit("qwen3_moe").eval()(input_ids, attention_mask=mask).logits)


@pytest.mark.parametrize("batch", [tokens(), [tokens(), tokens()], {"tokens": tokens()}])
def test_other_batches_are_refused(batch: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"CausalLM takes a dict with 'input_ids'"):
        module("llama").training_step(batch, 0)


def test_matrices_decay_and_norms_do_not() -> None:
    model = CausalLM(config("llama"), learning_rate=0.4, weight_decay=0.3, warmup_steps=4)
    model.configure_model()
    configured = model.configure_optimizers()
    decayed, kept = configured["optimizer"].param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    assert {p.ndim for p in kept["params"]} == {1}
    rates = []
    for _ in range(6):
        rates.append(decayed["lr"])
        configured["optimizer"].step()
        configured["lr_scheduler"]["scheduler"].step()
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def batches() -> DataLoader[Any]:
    input_ids, mask = tokens(24), torch.ones(24, 12, dtype=torch.long)
    mask[::3, :3] = 0
    rows = [{"input_ids": row, "attention_mask": kept} for row, kept in zip(input_ids, mask)]
    return DataLoader(rows, batch_size=8)  # type: ignore[arg-type]


def trainer(strategy: Any, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(strategy=strategy, accelerator="cpu", devices=1, **(quiet | options))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_checkpoint_needs_no_folder(family: str, tmp_path: Path) -> None:
    routed = ROUTED if family in MIXTURES else {}
    unsplit(family).save_pretrained(tmp_path / "in")
    torch.manual_seed(1)
    model = CausalLM(tmp_path / "in", learning_rate=1e-2, overrides=routed)
    run = trainer("auto", max_steps=2)
    run.fit(model, batches())
    run.save_checkpoint(tmp_path / "trained.ckpt")
    (tmp_path / "in").rename(tmp_path / "gone")
    again = CausalLM.load_from_checkpoint(tmp_path / "trained.ckpt").eval()
    assert again.learning_rate == 1e-2
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    assert torch.equal(again(tokens()), model.eval()(tokens()))
    from transformers import AutoModelForCausalLM

    for source in (again, tmp_path / "trained.ckpt"):
        save_pretrained(source, tmp_path / "out")
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        assert torch.equal(exported(tokens()).logits, again(tokens()))


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_a_virtual_mesh_trains_it(family: str) -> None:
    routed = ROUTED if family in MIXTURES else {}
    weights = []
    virtual = {"stages": 3, "replicas": 1, "micro_batches": 1, "engine": "virtual", "verification": None}
    recomputing = SentinelStrategy(**virtual, activation_checkpointing=True)
    for strategy in ("auto", SentinelStrategy(**virtual), recomputing):
        model = module(family, **routed)
        run = trainer(strategy, max_steps=3, limit_val_batches=1)
        run.fit(model, batches(), batches())
        assert {"train_loss", "val_loss"} <= run.callback_metrics.keys()
        assert math.isfinite(float(run.callback_metrics["val_loss"]))
        assert ("train_router_loss" in run.callback_metrics) == bool(routed)
        weights.append(model.state_dict())
    for others in weights[1:]:
        for name, value in weights[0].items():
            torch.testing.assert_close(others[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("source", ["some/folder", {"model_type": "llama", "hidden_size": 16}], ids=["folder", "config"])
def test_the_command_reads_a_source_as_it_is(source: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {"source": source, "overrides": {"output_router_logits": True}}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"model": {"class_path": "lightning_sentinel.models.CausalLM", "init_args": arguments}}))
    with pytest.raises(SystemExit):
        cli.main(["fit", "--config", str(file), "--print_config"])
    found = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert {name: found[name] for name in arguments} == arguments


def test_another_module_may_hold_the_layers() -> None:
    """As somebody would who wants another loss or optimizer than CausalLM's."""

    class Own(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = causal_lm_layers(config("llama"))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(tokens_and_mask(batch["input_ids"], batch["attention_mask"])).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    run = trainer(SentinelStrategy(stages=2, replicas=2, micro_batches=2, engine="virtual"), max_steps=2)
    run.fit(Own(), batches())
    assert run.global_step == 2
