"""What TRL's own trainers compute from log-probabilities: writes trl_losses.json.

    pip install trl==1.16.0
    python -m tests.trl_losses

TRL depends on pyarrow and pandas, 300 MB that no test needs again, so the values are
recorded. Each loss comes from the trainer's method, called with what it reads from a
trainer and a model; float64 throughout.
"""

import json
import pathlib
import types

import numpy as np

RECORDED = pathlib.Path(__file__).with_suffix(".json")
ROWS, TIME, WORDS = 4, 6, 7


def draws():
    """Log-probabilities of tokens `[chosen and rejected, time]`, masks, and labels."""
    rng = np.random.default_rng(0)
    mask = np.arange(TIME) < rng.integers(2, TIME + 1, (2 * ROWS, 1))
    policy, reference = -rng.gamma(2.0, 0.5, (2, 2 * ROWS, TIME)) * mask
    others = -rng.gamma(2.0, 0.5, (2, ROWS, TIME))
    student, teacher = rng.normal(size=(2, ROWS, TIME, WORDS))
    return {
        "mask": mask.astype(int),
        "policy": policy,
        "reference": reference,
        "others": others,
        "desirable": np.array([True, False, True, True]),
        "student": student,
        "teacher": teacher,
    }


def output(log_probs):
    """What TRL's models return, with zeros where only metrics read them."""
    import torch

    zeros = torch.zeros(log_probs.shape, dtype=log_probs.dtype)
    names = ("entropy", "mean_logits")
    return types.SimpleNamespace(
        log_probs=log_probs, is_top1=zeros > 1, **dict.fromkeys(names, zeros)
    )


class Metrics(dict):
    """A trainer's metrics: a list for every name that is asked for."""

    def __missing__(self, name):
        return self.setdefault(name, [])


def trainer(**fields):
    """What the methods read from a trainer."""
    import torch

    both = lambda x: x
    accelerator = types.SimpleNamespace(
        device=torch.device("cpu"), gather_for_metrics=both, gather=both
    )
    model = types.SimpleNamespace(training=True)
    defaults = {
        "accelerator": accelerator,
        "model": model,
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "_metrics": {"train": Metrics()},
    }
    return types.SimpleNamespace(**defaults | fields)


def dpo(values, loss_type, **options):
    """Loss and metrics of `DPOTrainer`."""
    import torch
    from trl.trainer.dpo_trainer import DPOTrainer

    own = trainer(
        loss_types=[loss_type],
        loss_weights=[1.0],
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        use_weighting=False,
        **{"beta": 0.1, "label_smoothing": 0.0} | options,
    )
    reference = torch.tensor(values["reference"]).sum(1).chunk(2)
    mask = torch.tensor(values["mask"])
    inputs = {
        "input_ids": torch.zeros(2 * ROWS, TIME + 1, dtype=torch.long),
        "attention_mask": torch.ones(2 * ROWS, TIME + 1, dtype=torch.long),
        "completion_mask": torch.nn.functional.pad(mask, (1, 0)),
        "ref_chosen_logps": reference[0],
        "ref_rejected_logps": reference[1],
    }
    model = lambda **_: output(torch.tensor(values["policy"]))
    loss = DPOTrainer._compute_loss(own, model, inputs, False)
    told = {k: v[0] for k, v in own._metrics["train"].items() if "/" in k}
    return {"loss": loss.item(), **{k: v for k, v in told.items() if "logits" not in k}}


def kto(values, nearer=False, **options):
    """Loss and baseline of `KTOTrainer`, on the first half of the completions.

    With `nearer`, the policy likes completions of other prompts less than the reference
    does, and the baseline is clipped at 0.
    """
    import torch
    from trl.trainer.kto_trainer import KTOTrainer

    others = np.sort(values["others"].sum(-1), axis=0)[:: -1 if nearer else 1]
    others_before, others = torch.tensor(others.copy())
    weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0}
    own = trainer(
        calculate_KL=True,
        loss_type="kto",
        _compute_kl_logps=lambda *_: others,
        **{"beta": 0.1} | weights | options,
    )
    mask = torch.tensor(values["mask"][:ROWS])
    inputs = {
        "input_ids": torch.zeros(ROWS, TIME + 1, dtype=torch.long),
        "attention_mask": torch.ones(ROWS, TIME + 1, dtype=torch.long),
        "completion_mask": torch.nn.functional.pad(mask, (1, 0)),
        "label": torch.tensor(values["desirable"]),
        "ref_logps": torch.tensor(values["reference"][:ROWS]).sum(1),
        "ref_KL_logps": others_before,
    }
    model = lambda **_: output(torch.tensor(values["policy"][:ROWS]))
    loss = KTOTrainer._compute_loss(own, model, inputs, False)
    return {"loss": loss.item(), "kl": own._metrics["train"]["kl"][0]}


def means(values):
    """Mean log-probabilities of chosen and rejected completions."""
    import torch

    lengths = values["mask"].sum(1)
    return torch.tensor(values["policy"].sum(1) / lengths).chunk(2)


def orpo(values, **options):
    """Losses of `ORPOTrainer` without its cross-entropy, and rewards.

    It computes in float32, so the values are only that accurate.
    """
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    own = trainer(**{"beta": 0.1} | options)
    losses, chosen, rejected, *_ = ORPOTrainer.odds_ratio_loss(own, *means(values))
    return {
        "loss": (-losses).tolist(),
        "chosen": chosen.tolist(),
        "rejected": rejected.tolist(),
    }


def cpo(first, second, **options):
    """Losses and rewards of `CPOTrainer`."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    own = trainer(**{"alpha": 0.0, "label_smoothing": 0.0} | options)
    losses, chosen, rejected = CPOTrainer.cpo_loss(own, first, second)[:3]
    return {
        "loss": losses.tolist(),
        "chosen": chosen.tolist(),
        "rejected": rejected.tolist(),
    }


def gkd(values, **options):
    """The divergence of `GKDTrainer`, averaged over the masked tokens."""
    import torch
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    labels = torch.tensor(np.where(values["mask"][:ROWS], 0, -100))
    logits = (torch.tensor(values[name]) for name in ("student", "teacher"))
    return GKDTrainer.generalized_jsd_loss(*logits, labels=labels, **options).item()


def recorded():
    """All values, and the version of TRL."""
    import torch
    import trl

    values = draws()
    ratio = values["policy"] - values["reference"]
    ratios = torch.tensor(ratio.sum(1)).chunk(2)
    found = {
        "version": trl.__version__,
        "dpo": {
            "default": dpo(values, "sigmoid"),
            "0.3": dpo(values, "sigmoid", beta=0.3),
        },
        "cdpo": cpo(*ratios, loss_type="sigmoid", beta=0.1, label_smoothing=0.2),
        "ipo": {"default": dpo(values, "ipo"), "0.5": dpo(values, "ipo", beta=0.5)},
        "orpo": {"default": orpo(values), "0.25": orpo(values, beta=0.25)},
        "simpo": cpo(*means(values), loss_type="simpo", beta=2.0, simpo_gamma=0.5),
        "kto": {
            "default": kto(values),
            "nearer": kto(values, nearer=True),
            "weights": kto(
                values, beta=0.5, desirable_weight=1.33, undesirable_weight=0.8
            ),
        },
        "gkd": {
            f"{beta} {temperature}": gkd(values, beta=beta, temperature=temperature)
            for beta in (0.0, 0.3, 1.0)
            for temperature in (1.0, 2.0)
        },
    }
    return found


if __name__ == "__main__":
    RECORDED.write_text(json.dumps(recorded(), indent=1) + "\n")
