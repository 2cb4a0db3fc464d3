"""The ranges of settings, each model's recipe, and presets: of the projects this one grew out of, and for digits."""

import math

# Smallest and largest value of a setting; other numbers may be anything from 0 up.
LIMITS = {
    "image_size": (8, 1024), "batch_size": (2, math.inf), "eval_batch_size": (1, math.inf),
    "num_epochs": (1, math.inf), "learning_rate": (1e-9, 100), "dropout": (0, 0.95), "momentum": (0, 0.9999),
    "accumulation_steps": (1, math.inf), "warmup": (0, 1), "step_epochs": (1, math.inf), "gamma": (1e-6, 1),
    "label_smoothing": (0, 0.99), "mixup_alpha": (1e-3, math.inf), "ema_decay": (0, 0.999999),
    "train_val_split": (0.01, 1), "rotation": (0, 180), "scale": (0, 0.9), "shear": (0, 2), "stretch": (0, 1),
    "shift": (0, 1), "crop": (0, 1), "crop_size": (0.1, 1), "perspective": (0, 0.45), "elastic": (0, 1),
    "brightness": (0, 1), "contrast": (0, 1), "erasing": (0, 1), "edge_softening": (0, 0.25), "knn_weight": (0, 0.99),
    "num_workers": (-1, 1024), "extra_weight": (1e-6, 100), "tta": (1, 1000),
}

MOST_USED = ("data_dir", "output_dir", "max_minutes", "num_epochs", "model", "image_size", "batch_size",
             "learning_rate", "folds", "seed")  # what `--help` shows first

# The values of "auto" by model. Those of cnn were chosen on validation rows; of those of resnet, batch_size, num_epochs
# and plain_epochs on a part of the data (benchmarks/RESULTS.md); the others are untuned, and augment all epochs.
RECIPES = {
    "resnet": {"image_size": 48, "batch_size": 512, "learning_rate": 4e-3, "num_epochs": 20, "dropout": 0.2,
               "plain_epochs": 3.0},
    "cnn": {"image_size": 24, "batch_size": 128, "learning_rate": 3e-3, "num_epochs": 10, "dropout": 0.3,
            "plain_epochs": 3.0},
    "digit-cnn": {"image_size": 28, "batch_size": 128, "learning_rate": 2e-3, "num_epochs": 20, "dropout": 0.25},
    "mlp": {"image_size": 28, "batch_size": 128, "learning_rate": 1e-3, "num_epochs": 10, "dropout": 0.0},
    "tiny": {"image_size": 28, "batch_size": 128, "learning_rate": 1e-2, "num_epochs": 20, "dropout": 0.0},
    "torchvision": {"image_size": 64, "batch_size": 128, "learning_rate": 1e-3, "num_epochs": 10, "dropout": 0.2},
}

# Everything of our own recipe switched off: the recipes of other projects start from this.
PLAIN = {
    "weight_decay": 0.0, "warmup": 0.0, "label_smoothing": 0.0, "ema_decay": 0.0, "max_grad_norm": 0.0,
    "knn_neighbors": 0, "dropout": 0.0, "rotation": 0.0, "scale": 0.0, "shear": 0.0, "stretch": 0.0, "elastic": 0.0,
    "recenter_warp": False, "edge_softening": 0.0, "image_size": 28, "schedule": "constant",
    "plain_epochs": 0.0,
}

# `--preset NAME`. docs/origins.md says which project each recipe comes from.
PRESETS = {
    "classic": PLAIN | {
        "batch_size": 32, "learning_rate": 3e-4, "weight_decay": 2e-5, "num_epochs": 20, "image_size": 48,
        "dropout": 0.5, "mixup": True, "schedule": "plateau", "max_grad_norm": 1.0, "edge_softening": 0.1,
        "rotation": 15.0, "scale": 0.1, "shear": 0.1, "shift": 0.1, "perspective": 0.1, "brightness": 0.2,
        "contrast": 0.2, "erasing": 0.2,
    },
    "digits-resnet18": PLAIN | {
        "model": "torchvision:resnet18", "optimizer": "adam", "learning_rate": 1e-2, "schedule": "step",
        "step_epochs": 5, "gamma": 0.05, "batch_size": 32, "num_epochs": 15, "early_stopping": 10, "rotation": 10.0,
        "normalize": "standard",
    },
    "digits-cnn": PLAIN | {
        "model": "digit-cnn", "optimizer": "adam", "learning_rate": 1e-3, "schedule": "multistep",
        "milestones": "8,12", "batch_size": 64, "num_epochs": 15, "early_stopping": 8, "select_by": "loss",
        "label_smoothing": 0.1, "dropout": 0.25, "rotation": 10.0, "shift": 0.05, "normalize": "standard",
        "train_val_split": 0.8,
    },
    "digits-transfer": PLAIN | {
        "model": "torchvision:resnet50", "weights": "torchvision", "freeze_epochs": 1, "learning_rate": 3e-4,
        "schedule": "cosine", "warmup": 0.1, "batch_size": 64, "num_epochs": 6, "image_size": 64, "dropout": 0.2,
        "weight_decay": 0.01, "rotation": 10.0, "normalize": "standard", "train_val_split": 0.8,
    },
    "digits-mlp": PLAIN | {
        "model": "mlp", "optimizer": "sgd", "momentum": 0.0, "learning_rate": 0.01, "batch_size": 64, "num_epochs": 3,
        "augment": False, "normalize": "min-max", "train_val_split": 0.8, "split_seed": 42, "precision": "float32",
    },
    "digits-tiny": {"model": "tiny", "label_smoothing": 0.0, "knn_neighbors": 0, "weight_decay": 1e-4, "elastic": 0.03,
                    "num_epochs": 40},
    "digits-fast": {"model": "digit-cnn", "num_epochs": 1, "learning_rate": 5e-3, "dropout": 0.0,
                    "label_smoothing": 0.0, "ema_decay": 0.99, "augment": False, "knn_neighbors": 0, "pictures": False},
    "digits-best": {"model": "cnn", "image_size": 28, "num_epochs": 20, "dropout": 0.3, "plain_epochs": 0.0},
}
