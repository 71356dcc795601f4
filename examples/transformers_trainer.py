"""transformers' Trainer with CurvaDion: a small Llama on the bytes of this repository's documentation.

    python examples/transformers_trainer.py                                 # one process
    torchrun --nproc-per-node 2 examples/transformers_trainer.py            # two replicas, each its own data
    torchrun --nproc-per-node 2 examples/transformers_trainer.py --resume   # from the newest checkpoint

Downloads nothing. What is CurvaDion's is marked.
"""

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from curvadion import LOW_COMMUNICATION, CurvaDion, param_groups_for
from curvadion.hosts.accelerate import replicate_mesh_of
from curvadion.hosts.transformers import CurvaDionCallback

ROOT = Path(__file__).resolve().parent.parent


class Bytes(torch.utils.data.Dataset):
    """Pieces of a text, byte by byte."""

    def __init__(self, text: bytes, length: int = 64):
        self._pieces = torch.tensor(list(text)).unfold(0, length, length)

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._pieces[index], "labels": self._pieces[index]}


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", default="runs/transformers", help="folder of the checkpoints")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--resume", action="store_true")
options = parser.parse_args()

set_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
)
text = b"".join(path.read_bytes() for path in sorted((ROOT / "docs").glob("*.md")))
args = TrainingArguments(
    output_dir=options.output,
    max_steps=options.steps,
    per_device_train_batch_size=8,
    logging_steps=10,
    eval_strategy="steps",
    eval_steps=20,
    save_steps=20,
    lr_scheduler_type="cosine",
    average_tokens_across_devices=False,  # CurvaDion: replicas need not wait for each other to count tokens
    report_to="none",
    use_cpu=not torch.cuda.is_available(),
)
trainer = Trainer(model=model, args=args, train_dataset=Bytes(text[:-8192]), eval_dataset=Bytes(text[-8192:]))

# CurvaDion, from here
trainer.optimizer = CurvaDion(
    param_groups_for(model),
    lr=0.03,
    replicate_mesh=replicate_mesh_of(trainer.accelerator),  # None on one process
    **LOW_COMMUNICATION,
)
trainer.add_callback(CurvaDionCallback(trainer))
# to here

trainer.train(resume_from_checkpoint=options.resume or None)
trainer.save_model()
loss = trainer.evaluate()["eval_loss"]
if trainer.is_world_process_zero():
    print(f"loss on held-out text after {trainer.state.global_step} steps: {loss:.4f}")
