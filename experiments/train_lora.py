"""Trains one LoRA adapter with fixed settings, and publishes it.

    python experiments/train_lora.py                                   # the built-in demonstration
    python experiments/train_lora.py method.r=16 train.learning_rate=5e-4
    python experiments/train_lora.py scaling.num_workers=2             # two workers, one adapter

The same command carries on a run that was interrupted. `rayfin train` does the same with a
configuration file.
"""

import rayfin

CONFIG = {
    "model": {"name": "smollm2-135m"},
    "data": {"path": "pydocs", "max_samples": 320, "max_length": 128, "val_size": 0.2},
    "method": {"type": "lora", "r": 8, "lora_alpha": 16},
    "train": {
        "learning_rate": 1.5e-3,
        "per_device_train_batch_size": 8,
        "max_steps": 24,
        "eval_steps": 8,
    },
    "publish": {"name": "pydocs-lora"},
    "storage": "./runs",
}

if __name__ == "__main__":
    with rayfin.script("train", CONFIG, __doc__) as script:
        result = rayfin.train(script.config, **script.options)
        script.show(result)
