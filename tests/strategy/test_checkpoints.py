"""What is saved and restored, and when, as far as one process shows it."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning, Timer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_sentinel as ls
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Mesh
from lightning_sentinel.pipeline.checkpoints.sharded import consolidate
from lightning_sentinel.strategy.refusals import refuse_pruning

Form = Any
FORMS = ["full", "sharded"]


class Small(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.net(batch) - batch.sum(1, keepdim=True)).pow(2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def loader() -> DataLoader[Any]:
    return DataLoader(torch.randn(24, 4, generator=torch.Generator().manual_seed(0)), batch_size=4)


def make(form: Form = "full", callbacks: Any = (), max_steps: int = 4, plain: bool = False, **settings: Any) -> L.Trainer:
    settings = {"micro_batches": 1, "engine": "virtual", "verification": None, "state_dict_type": form} | settings
    strategy: Any = ls.SentinelStrategy(2, 2, **settings)
    quiet: Any = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"accelerator": "cpu", "devices": 1, "max_steps": max_steps}
    return L.Trainer(strategy="auto" if plain else strategy, callbacks=list(callbacks), **quiet)


@pytest.mark.parametrize("form", FORMS)
def test_the_whole_state_loads_into_a_new_module(form: Form) -> None:
    """From a hook and after the run, whatever checkpoints look like."""
    during: list[dict[str, Any]] = []

    class Looks(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            during.append({name: value.clone() for name, value in trainer.strategy.whole_state_dict().items()})

    module, run = Small(), make(form, [Looks()])
    with pytest.raises(ConfigurationError, match=r"whole_state_dict\(\) was called before a run.*state_dict\(\)"):
        run.strategy.whole_state_dict()
    run.fit(module, loader())
    state = run.strategy.whole_state_dict()
    again = Small()
    again.load_state_dict(state)
    torch.testing.assert_close(dict(again.state_dict()), dict(module.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(during[-1], state, rtol=0, atol=0)


class TestResuming:
    @pytest.mark.parametrize("form", FORMS)
    def test_a_timer_that_has_run_out_trains_no_further(self, form: Form, tmp_path: Path) -> None:
        first = make(form, [Timer(timedelta(hours=1))])
        first.fit(Small(), loader())
        first.save_checkpoint(tmp_path / "at.ckpt")
        second = make(form, [Timer(timedelta(microseconds=1))], max_steps=9)
        second.fit(Small(), loader(), ckpt_path=tmp_path / "at.ckpt")
        assert second.global_step == 4

    @pytest.mark.parametrize("form", FORMS)
    def test_callbacks_have_their_state_when_a_fit_starts(self, form: Form, tmp_path: Path) -> None:
        order: list[str] = []

        class Remembers(L.Callback):
            def state_dict(self) -> dict[str, Any]:
                return {"some": "thing"}

            def load_state_dict(self, state_dict: dict[str, Any]) -> None:
                order.append(f"state {state_dict['some']}")

            def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
                order.append(f"checkpoint {len(checkpoint['state_dict'])}")

            def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
                order.append("fit")

        first = make(form, [Remembers()])
        first.fit(Small(), loader())
        first.save_checkpoint(tmp_path / "at.ckpt")
        order.clear()
        make(form, [Remembers()], max_steps=5).fit(Small(), loader(), ckpt_path=tmp_path / "at.ckpt")
        assert order == ["checkpoint 6", "state thing", "fit"]

    @pytest.mark.parametrize("form", FORMS)
    def test_objects_are_loaded_if_the_user_says_so(self, form: Form, tmp_path: Path) -> None:
        class Keeps(Small):
            def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                checkpoint["made at"] = Path("here")

            def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                assert checkpoint["made at"] == Path("here")

        first = make(form)
        first.fit(Keeps(), loader())
        first.save_checkpoint(tmp_path / "at.ckpt")
        second = make(form, max_steps=6)
        second.fit(Keeps(), loader(), ckpt_path=tmp_path / "at.ckpt", weights_only=False)
        assert second.global_step == 6
        with pytest.raises(Exception, match="weights_only"):
            make(max_steps=6).fit(Keeps(), loader(), ckpt_path=tmp_path / "at.ckpt")

    @pytest.mark.parametrize("form", FORMS)
    def test_what_was_saved_is_restored_between_runs(self, form: Form, tmp_path: Path) -> None:
        module, expected = Small(), Small()
        run = make(form)
        run.fit(module, loader())
        run.save_checkpoint(tmp_path / "at.ckpt")
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
        run._checkpoint_connector.restore(tmp_path / "at.ckpt")
        make(form).fit(expected, loader())
        torch.testing.assert_close(module.state_dict(), expected.state_dict())

    @pytest.mark.parametrize("form", FORMS)
    def test_hooks_see_the_checkpoint_of_a_plain_run(self, form: Form, tmp_path: Path) -> None:
        seen: list[dict[str, Any]] = []

        class Looks(Small):
            def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                seen.append(checkpoint)

            on_load_checkpoint = on_save_checkpoint

        first = make(form)
        first.fit(Looks(), loader())
        first.save_checkpoint(tmp_path / "at.ckpt")
        make(form, max_steps=6).fit(Looks(), loader(), ckpt_path=tmp_path / "at.ckpt")
        keys = {
            "epoch",
            "global_step",
            "pytorch-lightning_version",
            "state_dict",
            "loops",
            "callbacks",
            "optimizer_states",
            "lr_schedulers",
        }
        assert [set(checkpoint) for checkpoint in seen] == [keys, keys]

    def test_other_settings_are_told_with_who_is_banned(self, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
        path = tmp_path / "at.ckpt"
        before = {"verification": ls.Verification(warmup_steps=2, window=64), "response": ls.Response(banned=[(1, 0)])}
        now = {"verification": ls.Verification(warmup_steps=3, window=64, seed=5), "response": ls.Response(ban_after=9)}
        first = make(**before)
        first.fit(Small(), loader())
        first.save_checkpoint(path)
        make(max_steps=5, **before).fit(Small(), loader(), ckpt_path=path)
        assert not [one for one in recwarn if "other settings" in str(one.message)]
        changed = r"Verification: warmup_steps=2 is now 3\. Response: ban_after=5 is now 9, banned="
        says = rf"{changed}.* banned now: worker \(stage 1, replica 0\)"
        with pytest.warns(UserWarning, match=says):
            make(max_steps=5, **now).fit(Small(), loader(), ckpt_path=path)


class TestExchangedParameters:
    """Parameters that are not what they were when the module was cut."""

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("permanent", [True, False])
    def test_pruned_weights_are_saved_as_plain_lightning_saves_them(self, permanent: bool, form: Form, tmp_path: Path) -> None:
        class Saves(L.Callback):
            def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
                if trainer.global_step == 8:
                    trainer.save_checkpoint(path)

        saved, weights = [], []
        for plain in (True, False):
            path = tmp_path / f"{plain}.ckpt"
            how: Any = {"amount": 0.3, "make_pruning_permanent": permanent, "use_lottery_ticket_hypothesis": False}
            pruning = ModelPruning("l1_unstructured", **how)
            run, module = make(form, [pruning, Saves()], 11, plain), Small()
            run.fit(module, loader())
            weights.append(module.state_dict())
            if form == "sharded" and not plain:
                consolidate(path, tmp_path / "whole.ckpt")
                path = tmp_path / "whole.ckpt"
            saved.append(torch.load(path, weights_only=True))
        torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-5)
        assert set(saved[1]["state_dict"]) == set(saved[0]["state_dict"])
        assert any(name.endswith("_mask") for name in saved[0]["state_dict"]) is not permanent
        torch.testing.assert_close(saved[1]["state_dict"], saved[0]["state_dict"], rtol=0, atol=1e-5)
        moments = [one["optimizer_states"][0]["state"] for one in saved]
        torch.testing.assert_close(moments[1], moments[0], rtol=0, atol=1e-5)
        if permanent:
            resumed = make(form, max_steps=9)
            resumed.fit(Small(), loader(), ckpt_path=path)
            assert resumed.global_step == 9

    def test_what_is_parametrized_in_time_is_trained_and_saved(self, tmp_path: Path) -> None:
        class Normed(Small):
            def configure_model(self) -> None:
                if not nn.utils.parametrize.is_parametrized(self.net[0]):
                    nn.utils.parametrizations.weight_norm(self.net[0])

        first = make()
        first.fit(Normed(), loader())
        first.save_checkpoint(tmp_path / "at.ckpt")
        assert "net.0.parametrizations.weight.original1" in torch.load(tmp_path / "at.ckpt", weights_only=True)["state_dict"]
        second = make(max_steps=6)
        second.fit(Normed(), loader(), ckpt_path=tmp_path / "at.ckpt")
        assert second.global_step == 6

    @pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start"])
    def test_what_is_exchanged_too_late_is_named(self, hook: str) -> None:
        module = Small()
        setattr(module, hook, lambda: nn.utils.parametrizations.weight_norm(module.net[2]))
        with pytest.raises(ConfigurationError, match=r"net\.2\.weight is trained by AdamW, but Small has exchanged it"):
            make().fit(module, loader())

    def test_what_is_exchanged_in_the_middle_is_named_when_it_is_saved(self, tmp_path: Path) -> None:
        class Grows(L.Callback):
            def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
                pl_module.net[2] = nn.Linear(8, 8)
                trainer.optimizers[0].add_param_group({"params": list(pl_module.net[2].parameters())})

        run = make(callbacks=[Grows()], max_steps=6)
        run.fit(Small(), loader())
        with pytest.raises(ConfigurationError, match=r"AdamW has 2 parameter\(s\) that were not the module's .*shape \(8, 8\)"):
            run.save_checkpoint(tmp_path / "at.ckpt")

    def test_pruning_across_processes_is_refused(self) -> None:
        run = SimpleNamespace(callbacks=[ModelPruning("l1_unstructured")])
        with pytest.raises(ConfigurationError, match=r"ModelPruning compares .*one of 2 stages.*engine='virtual'"):
            refuse_pruning(run, Mesh(2, 2), virtual=False)  # type: ignore[arg-type]
        refuse_pruning(run, Mesh(1, 4), virtual=False)  # type: ignore[arg-type]


class TestHooks:
    def test_a_hook_that_leaves_weights_out_has_its_way(self, tmp_path: Path) -> None:
        class MicroBatchId(Small):
            def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                checkpoint["state_dict"] = {n: value for n, value in checkpoint["state_dict"].items() if n.startswith("net.4")}

        run = make()
        run.fit(MicroBatchId(), loader())
        run.save_checkpoint(tmp_path / "at.ckpt")
        assert list(torch.load(tmp_path / "at.ckpt", weights_only=True)["state_dict"]) == ["net.4.weight", "net.4.bias"]


@pytest.mark.parametrize("form", FORMS)
def test_a_module_is_saved_before_any_run(form: Form, tmp_path: Path) -> None:
    run, module = make(form), Small()
    run.strategy.connect(module)
    run.save_checkpoint(tmp_path / "at.ckpt")
    torch.testing.assert_close(torch.load(tmp_path / "at.ckpt", weights_only=True)["state_dict"], module.state_dict())
    other = Small.load_from_checkpoint(tmp_path / "at.ckpt")
    torch.testing.assert_close(other.state_dict(), module.state_dict())
