"""Sweeps QLoRA's settings on a real model and real data, and publishes the best adapter.

    python experiments/sweep_qlora.py                                  # the built-in demonstration
    python experiments/sweep_qlora.py data.path=my.jsonl publish.name=mine storage=/data/runs
    python experiments/sweep_qlora.py --resume                         # after Ctrl-C

The demonstration teaches a 135M-parameter model to tell which module of Python's standard library
a function belongs to. Any setting below can be overridden as section.key=value, or swept.
"""

import rayfin

CONFIG = {
    "model": {"name": "smollm2-135m"},
    "data": {"path": "pydocs", "max_samples": 300, "max_length": 128, "val_size": 0.15},
    "method": {"type": "qlora", "r": 8, "lora_alpha": 16, "quantization_bit": 4},
    "train": {
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 8,
        "max_steps": 20,
        "eval_steps": 7,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.05,
    },
    "sweep": {
        "num_samples": 5,
        "metric": "eval_loss",
        "parameters": {
            "method.r": [4, 8, 16, 32],
            "train.learning_rate": {"space": "loguniform", "lower": 2e-4, "upper": 5e-3},
        },
    },
    "publish": {"name": "pydocs"},
    "storage": "./runs",
}

if __name__ == "__main__":
    with rayfin.script("sweep", CONFIG, __doc__) as script:
        result = rayfin.sweep(script.config, **script.options)
        script.show(result)
