"""What every promise of the loop is tried on: a method on a tiny corpus, by a word for what is special about it."""

from __future__ import annotations

from typing import Any

WIDTHS = {"strong": 12, "weak": 12, "third": 8}  # of the vector modalities in the synthetic corpora
SMALL_ENCODERS = {m: {"name": "mlp", "hidden": 16, "width": 8} for m in WIDTHS}
PICTURES = {name: {"name": "cnn", "channels": [4, 6], "width": 8, "norm": "batch"} for name in ("image", "sound")}

# Settings that make every method small and quick. One row per method, in the order of METHODS.
SMALL: dict[str, dict[str, Any]] = {
    "agm": {"name": "agm"},
    "aug": {"name": "aug", "hidden": 16, "check_every": 1},
    "di_mml": {"name": "di_mml", "contrast_temperature": 5.0},
    "g_blend": {"name": "g_blend", "probe_epochs": 2},
    "gradient_boosting": {"name": "gradient_boosting", "hidden": 16, "round_epochs": 1},
    "joint": {"name": "joint"},
    "late": {"name": "late"},
    "lfm": {"name": "lfm", "schedule": "constant", "first": 0.7},
    "maie": {"name": "maie", "rounds": 2, "hidden": 16, "bottleneck": 8},
    "mla": {"name": "mla"},
    "mmcosine": {"name": "mmcosine"},
    "mmpareto": {"name": "mmpareto"},
    "mslr": {"name": "mslr", "window": 1, "factors": {"strong": 0.9, "weak": 1.1}},
    "ogm": {"name": "ogm"},
    "ogm_ge": {"name": "ogm_ge", "alpha": 0.1},
    "opm": {"name": "opm"},
    "pmr": {"name": "pmr"},
    "reconboost": {"name": "reconboost", "hidden": 16, "phase1_epochs": 2, "phase2_epochs": 1},
    "unimodal": {"name": "unimodal", "modality": "weak"},
}
SMALL_AUG = SMALL["aug"]

# Cases: (corpus "pair", "three" or "media", what differs from the base experiment). Every method has one here by its
# own name, and one of three modalities; options that change the arithmetic have their own.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: ("pair", {"method": method}) for name, method in SMALL.items()},
    **{f"{name}-of-three": ("three", {"method": method}) for name, method in SMALL.items() if name != "unimodal"},
    "joint-sum": ("pair", {"method": {"name": "joint", "head": "sum"}}),
    "aug-learned-weights": ("pair", {"method": {**SMALL_AUG, "weights": "learned"}}),
    "aug-fixed-weights": ("pair", {"method": {**SMALL_AUG, "weights": "fixed", "weight": 0.25}}),
    "aug-fixed-assignment": ("pair", {"method": {**SMALL_AUG, "assign": "fixed", "classifiers": {"weak": 3}}}),
    "aug-frozen": ("pair", {"method": {**SMALL_AUG, "train_new_classifiers": False}}),
    "aug-of-three-learned-weights": ("three", {"method": {**SMALL_AUG, "weights": "learned"}}),
    "gradient_boosting": ("pair", {"method": SMALL["gradient_boosting"], "epochs": 6}),
    "gradient_boosting-search": (
        "pair",
        {
            "method": {**SMALL["gradient_boosting"], "line_search": True, "start": "best", "boost": ["strong", "weak"]},
            "epochs": 6,
        },
    ),
    "gradient_boosting-soft": ("pair", {"method": {**SMALL["gradient_boosting"], "soft_ce": True}, "epochs": 6}),
    "gradient_boosting-pictures": (
        "media",
        {"modalities": PICTURES, "batch_size": 16, "method": SMALL["gradient_boosting"], "epochs": 5},
    ),
    "lfm-fitted": ("pair", {"method": {"name": "lfm"}, "epochs": 6}),
    "lfm-learned": ("pair", {"method": {"name": "lfm", "schedule": "learned", "first": 0.5, "rate": 0.05}}),
    "lfm-swapped": ("pair", {"method": {"name": "lfm", "schedule": "linear", "alignment": "swapped"}, "epochs": 6}),
    "mmcosine-product": ("pair", {"method": {"name": "mmcosine", "prediction": "product"}}),
    "agm-scale": ("pair", {"method": {"name": "agm", "mode": "scale", "head": "sum", "alpha": 0.5, "clip": None}}),
    "aug-pictures-computed-again": (
        "media",
        {
            "modalities": PICTURES,
            "batch_size": 16,
            "method": SMALL_AUG,
            "compute": {"parts": 1, "channels_last": True},
        },
    ),
    "agm-pictures": ("media", {"modalities": PICTURES, "batch_size": 16, "method": SMALL["agm"]}),
    "agm-pictures-released": (
        "media",
        {"modalities": PICTURES, "batch_size": 16, "method": {"name": "agm", "padded": "network", "last_epoch": 2}},
    ),
    "mslr-gradients": ("pair", {"method": {**SMALL["mslr"], "apply": "gradients"}}),
    "opm-same-batch": ("pair", {"method": {"name": "opm", "q_of": "same_batch", "warmup": 1}}),
    "ogm-continuous": ("pair", {"method": {"name": "ogm", "form": "continuous", "head": "sum", "last_epoch": 2}}),
    "ogm_ge-pictures": (
        "media",
        {"modalities": PICTURES, "batch_size": 16, "method": {"name": "ogm_ge", "tensors": "conv"}},
    ),
    "di_mml": ("pair", {"method": SMALL["di_mml"], "epochs": 6}),
    "di_mml-of-three": ("three", {"method": SMALL["di_mml"], "epochs": 6}),
    "di_mml-pictures": (
        "media",
        {"modalities": PICTURES, "batch_size": 16, "method": SMALL["di_mml"], "epochs": 5},
    ),
    "maie": ("pair", {"method": SMALL["maie"], "epochs": 6}),
    "maie-of-three": ("three", {"method": {**SMALL["maie"], "lengths": {"strong": 0.5}}, "epochs": 9}),
    "maie-pictures": ("media", {"modalities": PICTURES, "batch_size": 16, "method": SMALL["maie"], "epochs": 6}),
    "maie-released": ("pair", {"method": {**SMALL["maie"], "sam": "released"}, "epochs": 4}),
    "reconboost": ("pair", {"method": SMALL["reconboost"], "epochs": 7}),
    "reconboost-of-three": ("three", {"method": SMALL["reconboost"], "epochs": 9}),
    "reconboost-released": (
        "pair",
        {"method": {**SMALL["reconboost"], "reduction": "released", "consolidation": "detached"}, "epochs": 4},
    ),
    "mla-fixed": ("pair", {"method": {"name": "mla", "fusion": "fixed", "weights": {"strong": 0.3, "weak": 0.7}}}),
    "pmr-released": ("pair", {"method": {**SMALL["pmr"], "form": "released", "head": "sum"}}),
    "g_blend-online": ("pair", {"method": {"name": "g_blend", "mode": "online", "super_epoch": 2}}),
    "g_blend-fixed": ("pair", {"method": {"name": "g_blend", "mode": "fixed", "inference": "average"}}),
    "mmpareto-pictures": ("media", {"modalities": PICTURES, "batch_size": 16, "method": SMALL["mmpareto"]}),
    # --- not about one method
    "adam-cosine": (
        "pair",
        {
            "method": SMALL_AUG,
            "optim": {"name": "adam", "lr": 0.005, "schedule": {"name": "cosine", "warmup": 1}},
        },
    ),
    "legacy-steps": ("pair", {"method": SMALL_AUG, "optim": {"legacy_zero_grad_step": True}}),
    "dropout": ("pair", {"modalities": {m: {**SMALL_ENCODERS[m], "dropout": 0.3} for m in ("strong", "weak")}}),
    "streaming-noise": (
        "pair",
        {"data": {"cache": "off", "augment": {"weak": [{"name": "noise", "std": 0.2}]}, "shuffle_window": 50}},
    ),
    "batch-norm": ("media", {"modalities": PICTURES, "batch_size": 16}),
    "local-batch-norm": ("media", {"modalities": PICTURES, "batch_size": 16, "batch_norm": "local"}),
    "large-batches": ("pair", {"batch_size": 120, "method": SMALL_AUG}),  # valid and test are less than one
}

# Nothing new with two workers.
ALONE = {
    "joint-sum",
    "gradient_boosting-soft",
    "lfm-fitted",
    "lfm-swapped",
    "mmcosine-product",
    "maie-released",
    "reconboost-released",
    "aug-fixed-weights",
    "aug-fixed-assignment",
    "aug-frozen",
    "dropout",
    "mla-fixed",
    "g_blend-fixed",
}
# Cases that two workers also go through with interruptions, after so many controls.
STOPS = {
    "aug-learned-weights": [4, 9],
    "gradient_boosting-search": [30],
    "lfm-learned": [13],
    "local-batch-norm": [4],
    "maie": [13],
    "aug": [7],
    "pmr": [13],
    "g_blend-online": [19],
}
# Cases whose objective changes on the way, so that its first and last values do not compare.
MOVING_OBJECTIVE = {"adam-cosine", "legacy-steps", "large-batches", "g_blend", "g_blend-of-three", "g_blend-online"}
MOVING_OBJECTIVE |= {name for name in CASES if name.startswith(("aug", "di_mml", "gradient_boosting", "maie"))}
MOVING_OBJECTIVE |= {name for name in CASES if name.startswith(("lfm-fitted", "lfm-learned", "lfm-swapped"))}
MOVING_OBJECTIVE |= {name for name in CASES if name.startswith("reconboost")}
