"""A recipe trained from Python, followed by a callback: `python examples/train_a_recipe.py [RECIPE] [DATA]`."""

import sys

import fastcifar


class Best(fastcifar.Callback):
    """Remembers the best accuracy on the test set."""

    accuracy = 0.0

    def on_epoch_end(self, run, row):
        """Take in an epoch's line of `metrics.jsonl`."""
        if "test" in row:  # not every recipe evaluates each epoch
            weights = row["test"].get("ema", row["test"]["raw"])  # those that the summary tells of
            self.accuracy = max(self.accuracy, weights["accuracy"])


name, data = (*sys.argv[1:], None, None)[:2]
small = {} if name else {"train.epochs": 2, "data.subset": 500}
recipe = fastcifar.load_recipe(name or "smoke", set=small)
best = Best()
run = fastcifar.train(recipe, data=data, callbacks=[best], quiet=True)

metrics = run.metrics_arrays()
print(f"{run.folder}: {run.summary['last']['accuracy']:.2f}%, best {best.accuracy:.2f}%")
print("loss by epoch:", metrics["train_loss"].round(3))
print("logits of the test set:", run.logits("test/last/raw").shape)
