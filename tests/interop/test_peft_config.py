"""Every PEFT config field is implemented, harmless, or an error off its default."""

import dataclasses

import pytest

from lorax.interop import peft_config
from lorax.interop.peft_config import DEFAULTS, HARMLESS, IMPLEMENTED, read

# A file as PEFT 0.21 writes it, in full.
WRITTEN = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": "org/base",
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 32,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["v_proj", "q_proj"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}
ADALORA = {"peft_type": "ADALORA", "init_r": 4, "lora_alpha": 6, "total_step": 9}


def test_a_whole_file():
    found = read(WRITTEN)
    assert (found.kind, found.rank, found.alpha, found.dropout) == ("lora", 8, 32, 0.05)
    assert found.scale("model.layers.3.self_attn.q_proj") == 4
    assert found.selects("model.layers.3.self_attn.q_proj", True)
    assert not found.selects("model.layers.3.self_attn.k_proj", True)
    assert read({"peft_type": "LORA"}).rank == 8  # older versions write fewer


# For each field that is not implemented, a value that PEFT accepts.
OTHERS = {
    "alora_invocation_tokens": [3, 4],
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 0.1},
    "megatron_config": {"tensor_model_parallel_size": 1},
    "monteclora_config": {"num_samples": 8},
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
}


def test_there_is_a_value_for_every_such_field():
    assert set(OTHERS) == set(DEFAULTS)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_implemented_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}=.* is not implemented"):
        read(WRITTEN | {name: OTHERS[name]})


def test_every_field_of_the_installed_version():
    peft = pytest.importorskip("peft", reason="needs the golden extra: torch, peft")
    kinds = {"LORA": peft.LoraConfig, "ADALORA": peft.AdaLoraConfig}
    groups = [IMPLEMENTED, HARMLESS, set(DEFAULTS)]
    assert sum(map(len, groups)) == len(set().union(*groups)), "a field in two groups"
    for kind, cls in kinds.items():
        for field in dataclasses.fields(cls):
            assert field.name in set().union(*groups), f"{kind}: {field.name}"
            if field.name in DEFAULTS:
                assert field.default == DEFAULTS[field.name], field.name
    fields = {f.name for cls in kinds.values() for f in dataclasses.fields(cls)}
    assert set().union(*groups) <= fields, "names that PEFT does not have"
    told = peft.AdaLoraConfig(total_step=3, target_modules=["a"]).to_dict()
    read({**told, "peft_type": "ADALORA", "target_modules": ["a"]})


def test_unknown_fields_are_refused():
    with pytest.raises(ValueError, match="unknown fields.*gamma=3"):
        read(WRITTEN | {"gamma": 3})


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"peft_type": "BOFT"}, "peft_type='BOFT' is not implemented"),
        ({"r": 0}, "r=0; it must be an int >= 1"),
        ({"r": True}, "r=True; it must be"),
        ({"r": 2**70}, "r=1180591620717411303424; it must be"),
        ({"lora_alpha": "16"}, "lora_alpha='16'; it must be a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan; it must be a number"),
        ({"lora_alpha": 1e300}, r"lora_alpha=1e\+300; it must be a number"),
        ({"lora_dropout": 1}, "lora_dropout=1; it must be a number >= 0 and < 1"),
        ({"lora_dropout": -1e-12}, "lora_dropout=-1e-12; it must be"),
        ({"use_dora": "yes"}, "use_dora='yes'; it must be true or false"),
        ({"target_modules": [1]}, r"target_modules=\[1\]; it must be text, or a list"),
        ({"task_type": {}}, "task_type={}; it must be text"),
        ({"layers_to_transform": -1}, "layers_to_transform=-1; it must be an int >= 0"),
        ({"layers_to_transform": True}, "layers_to_transform=True; it must be an int"),
        ({"modules_to_save": "score"}, "modules_to_save='score'; it must be a list"),
        ({"target_modules": "(q"}, "target_modules: .* not a regular expression"),
        ({"target_modules": r"(q)\1"}, "target_modules: .* back-reference"),
        ({"target_modules": "q", "layers_to_transform": [1]}, "layers_to_transform"),
        (
            {"layers_to_transform": ["1"]},
            r"=\['1'\]; it must be an int >= 0.*, or a list",
        ),
        ({"rank_pattern": {"q": 0}}, "rank_pattern.q=0; it must be an int >= 1"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern: .* not a regular expression"),
        ({"rank_pattern": [2]}, r"rank_pattern=\[2\]; it must be an object"),
        ({"alpha_pattern": {"q": None}}, "alpha_pattern.q=None; it must be a number"),
        ({"init_lora_weights": "psychic"}, "init_lora_weights='psychic' is unknown"),
        ({**ADALORA, "lora_alpha": 0}, "lora_alpha=0"),
        ({**ADALORA, "use_dora": True}, "no meaning for AdaLoRA"),
        ({**ADALORA, "rank_pattern": {"q": [True]}}, "1 entries, but init_r=4"),
        (
            {**ADALORA, "rank_pattern": {"q": [1, 1, 1, 1]}},
            "q=.*a list, each true or false",
        ),
        ({**ADALORA, "rank_pattern": [1]}, r"rank_pattern=\[1\]; it must be an obj"),
    ],
)
def test_values_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        read(WRITTEN | fields)


NAMES = [
    "model.embed_tokens",
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.mlp.experts.0.up_proj",
    "classifier.dense",
    "lm_head",
]


@pytest.mark.parametrize(
    "fields, want",
    [
        ({"target_modules": ["q_proj"]}, [1, 2]),
        ({"target_modules": ["proj"]}, []),
        ({"target_modules": ["0.self_attn.q_proj", "lm_head"]}, [1, 5]),
        ({"target_modules": r".*\.1\d*\..*proj"}, [2, 3]),
        ({"target_modules": "all-linear"}, [1, 2, 3, 4]),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, [2]),
        ({"target_modules": ["up_proj"], "layers_to_transform": [11]}, [3]),
        ({"target_modules": ["up_proj"], "layers_to_transform": [0]}, []),
        ({"target_modules": ["lm_head"], "layers_to_transform": [0]}, [5]),
        (
            {
                "target_modules": ["up_proj"],
                "layers_to_transform": [0],
                "layers_pattern": ["experts"],
            },
            [3],
        ),
        (
            {"target_modules": ["q_proj"], "exclude_modules": ["0.self_attn.q_proj"]},
            [2],
        ),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*\.1\..*"}, [1]),
        (
            {"target_modules": "all-linear", "modules_to_save": ["classifier"]},
            [1, 2, 3],
        ),
    ],
)
def test_which_modules(fields, want):
    found = read(WRITTEN | fields)
    chosen = [i for i, n in enumerate(NAMES) if found.selects(n, "embed" not in n)]
    assert chosen == want
    peft = pytest.importorskip("peft", reason="needs the golden extra: torch, peft")
    if fields["target_modules"] != "all-linear":  # PEFT expands it earlier
        from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

        config = peft.LoraConfig(**fields)
        theirs = [check_target_module_exists(config, name) for name in NAMES]
        theirs = [
            i for i, m in enumerate(theirs) if m and not isinstance(m, _ExcludedModule)
        ]
        assert theirs == want


def test_ranks_and_scales():
    found = read(
        WRITTEN
        | {
            "use_rslora": True,
            "rank_pattern": {"1.self_attn.q_proj": 16, "q_proj": 4},
            "alpha_pattern": {"^lm_head": 3},
        }
    )
    assert [found.kept(n) for n in NAMES] == [8, 4, 16, 8, 8, 8]
    assert found.scale(NAMES[1]) == 16 and found.scale("lm_head") == 3 / 8**0.5
    mask = {"base_model.model.a.b.lora_E.default": [True, False, False, True]}
    found = read(ADALORA | {"rank_pattern": mask, "alpha_pattern": {"a.b": 3}})
    assert found.kept("a.b") == 2 and found.kept("c.b") == 4
    assert found.scale("a.b") == 6 / (4 + 1e-5)


@pytest.mark.parametrize(
    "name", ["pissa", "pissa_niter_4", "OLoRA", "corda", "lora_ga"]
)
def test_inits_that_move_the_base_are_told(name):
    assert read(WRITTEN | {"init_lora_weights": name}).moved == name.lower()
    assert not read(WRITTEN | {"init_lora_weights": "gaussian"}).moved
    assert peft_config.MOVING.fullmatch("pissa_niter_x") is None
