import sys

import torch
from accelerate import Accelerator
from transformers import GPT2Config, GPT2LMHeadModel, get_linear_schedule_with_warmup

from tram_ds.integrations import AcceleratedStepper, causal_lm

folder, *checkpoint = sys.argv[1:]
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=8))
rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(32, (22, 8))]
loader = torch.utils.data.DataLoader(rows, batch_size=2)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
accelerator = Accelerator(gradient_accumulation_steps=2)
scheduler = get_linear_schedule_with_warmup(optimizer, 2, 6)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
stepper = AcceleratedStepper(accelerator, model, optimizer, "tram_prev", clip_norm=0.5)
if checkpoint:
    accelerator.load_state(*checkpoint)
    loader = accelerator.skip_first_batches(loader, 4)
for batch in loader:
    with accelerator.accumulate(model):
        stepper.step(batch, causal_lm)  # for tram_ds: not backward, clip, optimizer.step
        scheduler.step()
    if stepper.stepper.steps == 2 and accelerator.sync_gradients:
        accelerator.save_state(folder)
