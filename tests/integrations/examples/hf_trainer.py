import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from tram_ds.integrations import TramTrainer  # instead of transformers' Trainer

folder, *checkpoint = sys.argv[1:]
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=8))
rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(32, (22, 8))]
arguments = TrainingArguments(
    folder,
    num_train_epochs=1,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    learning_rate=1e-2,
    warmup_steps=2,
    max_grad_norm=0.5,
    logging_steps=1,
    save_steps=2,
    report_to="none",
)
trainer = TramTrainer(
    model=model,
    args=arguments,
    train_dataset=rows,
    algorithm={"name": "tram_prev", "radius_scale": 10.0},
)
trainer.train(*checkpoint)
trainer.save_model()
