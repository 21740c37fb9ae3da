"""DPO by TRL on the pairs of a study: the competitor, in a process of its own.

    python -m studies.dpo --model out/smollm2 --data pairs.jsonl.gz --to FOLDER --lr 5e-4
    python -m studies.dpo ... --wrong-labels 0.3       TRL's loss "robust", told that share

Needs `pip install trl`. The LoRA has the size of dual.py's, the learning rate its schedule, and the
steps the same number of pairs. Writes the adapter as PEFT does, with dpo.json beside it.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from common.config import UserError, peak_memory, run, setting
from common.stages import versions, write_json
from studies import tasks


@dataclass
class Config:
    lr: float = setting(5e-4, "peak learning rate: 10% warm-up, then a cosine to 0")
    beta: float = setting(0.1, "β of DPO")
    wrong_labels: float = setting(
        0.0, "the share of wrong labels that the loss allows for; 0 is plain DPO", minimum=0
    )
    steps: int = setting(60, "optimizer steps", minimum=1)
    batch_size: int = setting(8, "pairs in a step", minimum=1)
    model: str = setting("out/smollm2", "the folder that studies.smollm2 wrote", group="data")
    data: str = setting("", "a pairs file of studies.tasks", group="data")
    dtype: str = setting("float32", "of the base model", group="run")
    to: str = setting("dpo", "folder of the adapter", group="run")
    seed: int = setting(0, "seed of the adapter and of the order", group="run")


def training_rows(path):
    """The training rows in TRL's conversational form: lists of turns, so that it renders them by
    the chat template as common/chat.py does."""
    rows = []
    for row in tasks.read_rows(path):
        if row["split"] == "train":
            rows.append(
                {
                    "prompt": [{"role": "user", "content": row["prompt"]}],
                    "chosen": [{"role": "assistant", "content": row["chosen"]}],
                    "rejected": [{"role": "assistant", "content": row["rejected"]}],
                }
            )
    return rows


def main(config):
    try:
        import torch
        from datasets import Dataset
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import DPOConfig, DPOTrainer
    except ImportError as error:
        raise UserError(f"{error}: run `pip install trl peft` first") from None
    start = time.perf_counter()
    arguments = DPOConfig(
        output_dir=config.to,
        beta=config.beta,
        loss_type=["robust" if config.wrong_labels else "sigmoid"],
        label_smoothing=config.wrong_labels,
        learning_rate=config.lr,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, config.steps // 10),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=config.seed,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=10,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
    )
    dtype = getattr(torch, config.dtype)
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(config.model, dtype=dtype),
        args=arguments,
        train_dataset=Dataset.from_list(training_rows(config.data)),
        processing_class=AutoTokenizer.from_pretrained(config.model),
        peft_config=LoraConfig(
            r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    trainer.train()
    trainer.save_model(config.to)
    figures = {
        "settings": vars(config),
        "versions": {**versions(), "trl": __import__("trl").__version__},
        "seconds": round(time.perf_counter() - start, 1),
        "peak GB": round(peak_memory() / 1e9, 2),
        "log": trainer.state.log_history,
    }
    write_json(Path(config.to) / "dpo.json", figures)
    print(f"wrote {config.to}")


if __name__ == "__main__":
    run(main, Config)
