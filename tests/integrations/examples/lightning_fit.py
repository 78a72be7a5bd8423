import sys

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import GPT2Config, GPT2LMHeadModel, get_linear_schedule_with_warmup

from tram_ds.integrations import TramCallback, causal_lm


class LanguageModel(L.LightningModule):
    def __init__(self):
        super().__init__()
        shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8}
        self.gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=32, **shape)).train()

    def forward(self, **inputs):
        return self.gpt2(**inputs)

    def training_step(self, batch, index):
        return self(**batch).loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = get_linear_schedule_with_warmup(optimizer, 2, 12)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


folder, *checkpoint = sys.argv[1:]
torch.manual_seed(0)
model = LanguageModel()
rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(32, (22, 8))]
trainer = L.Trainer(
    max_epochs=2,
    accumulate_grad_batches=2,
    gradient_clip_val=0.5,
    logger=False,
    default_root_dir=folder,
    callbacks=[
        ModelCheckpoint(folder, "{step}", save_top_k=-1),
        TramCallback("tram_prev", causal_lm),  # for tram_ds
    ],
)
loader = torch.utils.data.DataLoader(rows, batch_size=2)
trainer.fit(model, loader, ckpt_path=checkpoint[0] if checkpoint else None)
