"""Sweeps P-Tuning: how many virtual tokens, how wide a prompt encoder, how fast.

    python experiments/sweep_p_tuning.py
    python experiments/sweep_p_tuning.py data.path=my.jsonl publish.name=mine

A P-Tuning adapter is a few virtual tokens: the smallest of all, trained, swept and published like
any other. It needs higher learning rates and more steps than LoRA.
"""

import rayfin

CONFIG = {
    "model": {"name": "smollm2-135m"},
    "data": {"path": "pydocs", "max_samples": 320, "max_length": 128, "val_size": 0.2},
    "method": {"type": "p_tuning", "num_virtual_tokens": 16, "encoder_hidden_size": 256},
    "train": {
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 8,
        "max_steps": 40,
        "eval_steps": 10,
    },
    "sweep": {
        "num_samples": 5,
        "parameters": {
            "method.num_virtual_tokens": [8, 16, 32],
            "method.encoder_hidden_size": [128, 256, 576],
            "train.learning_rate": {"space": "loguniform", "lower": 1e-3, "upper": 2e-2},
        },
    },
    "publish": {"name": "pydocs-p-tuning"},
    "storage": "./runs",
}

if __name__ == "__main__":
    with rayfin.script("sweep", CONFIG, __doc__) as script:
        result = rayfin.sweep(script.config, **script.options)
        script.show(result)
