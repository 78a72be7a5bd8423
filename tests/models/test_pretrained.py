"""Any Hugging Face model of the three auto classes: forward, noise through a hook, TRAM steps,
ties, recomputation."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from tram_ds.algorithms.stepper import wrap
from tram_ds.models.architecture import tiny
from tram_ds.models.config import load_config
from tram_ds.models.noise import Added, Conditions, Noise
from tram_ds.models.processors import load_image_processor, load_tokenizer
from tram_ds.models.randomness import StepRandomness
from tram_ds.recipe.model_section import ModelSection
from tram_ds.recipe.sections import EvalSection, TrainSection
from tram_ds.recipe.task_section import TaskSection
from tram_ds.runtime.errors import DataError
from tram_ds.tasks import choose as tasks

MODELS = [  # task, architecture, whether sdpa exists
    ("language_modeling", "gpt2", True),
    ("language_modeling", "llama", True),
    ("language_modeling", "qwen2", True),
    ("entailment", "xlm-roberta", True),
    ("entailment", "bert", True),
    ("entailment", "deberta-v2", False),
    ("entailment", "gpt2", True),
    ("entailment", "qwen2", True),
    ("image_classification", "vit", True),
]
IDS = [f"{task}-{kind}" for task, kind, _ in MODELS]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def task_for(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))

    def make(task, kind, **model):
        section = {"name": task, "data": "generated", "cache_dir": cache}
        if task != "image_classification":
            section["seq_len"] = 32
        if task == "entailment":
            section["seq_len"] = 48
        return tasks.build(
            SimpleNamespace(
                task=TaskSection(**section),
                model=ModelSection(init=tiny(kind), **model),
                train=TrainSection(steps=1, global_batch=2, micro_batch=1),
                eval=EvalSection(),
            )
        )

    return make


def batch_of(task, count=4):
    rows = task.train_rows()
    return task.collate([rows[i] for i in range(count)])


@pytest.mark.parametrize("name, kind, sdpa", MODELS, ids=IDS)
def test_forward_noise_and_steps(task_for, name, kind, sdpa):
    task = task_for(name, kind, dropout=0.1, **({} if sdpa else {"attention": "eager"}))
    model, batch = task.model(), batch_of(task)
    output = task.forward(model, batch)
    assert (int(output.count), len(output.logits)) == task.counts(batch) and bool(
        output.loss_sum.isfinite()
    )

    model.eval()
    with torch.no_grad():
        clean = task.forward(model, batch).logits
        added = Added(Noise(task.noise_site, 0.5), StepRandomness(0, 0), 0, False)
        with Conditions(model, model).during(added, train=False, last=False):
            noised = task.forward(model, batch).logits
        after = task.forward(model, batch).logits
    assert torch.equal(clean, after), "the hook is gone, and the batch is as it was"
    assert noised.isfinite().all() and not torch.allclose(clean, noised)
    model.train()

    for algorithm in ("tram_x", "tram_prev"):
        model = task.model()
        before = {key: value.clone() for key, value in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        site = {"noise_site": task.noise_site} if algorithm == "tram_x" else {}
        stepper = wrap(model, optimizer, algorithm, **site)
        reports = [stepper.step([batch, batch], task.forward, task.counts) for _ in range(2)]
        assert all(bool(report.loss.isfinite()) and not report.skipped for report in reports)
        assert float(reports[1].distance) > 0 and float(reports[1].radius) > 0
        assert any(not torch.equal(value, before[key]) for key, value in model.named_parameters())


@pytest.mark.parametrize("name, kind, sdpa", MODELS, ids=IDS)
def test_recomputed_activations_give_the_same_gradient(task_for, name, kind, sdpa):
    attention = {} if sdpa else {"attention": "eager"}
    gradients = []
    for recompute in (False, True):
        task = task_for(name, kind, dropout=0.0, activation_checkpointing=recompute, **attention)
        model = task.model()
        assert model.is_activation_checkpointing is recompute
        task.forward(model, batch_of(task)).loss_sum.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 4
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_ties_are_kept_by_a_step_and_by_saving(task_for, kind, tmp_path):
    task = task_for("language_modeling", kind)
    section = ModelSection(init=tiny(kind) | {"tie_word_embeddings": True})
    task.model_section = section
    model = task.model()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    stepper = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), "tram_prev")
    stepper.step([batch_of(task)], task.forward, task.counts)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_code_in_a_model_folder_is_never_run_and_nobody_is_asked(tmp_path, monkeypatch):
    evil = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"
    (tmp_path / "evil.py").write_text(evil + "class Config: pass\nclass Thing: pass\n")
    config = {
        "model_type": "nobody-knows",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Thing"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = {"tokenizer_class": "Thing", "auto_map": {"AutoTokenizer": ["evil.Thing", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    processor = {"image_processor_type": "Thing", "auto_map": {"AutoImageProcessor": "evil.Thing"}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run it"))
    for load in (
        load_tokenizer,
        load_image_processor,
        lambda path: load_config(ModelSection(path=path)),
    ):
        with pytest.raises(DataError, match="no usable"):
            load(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "method",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "mxfp4"},
        {"bits": 8},
    ],
)
def test_quantised_weights_are_refused_by_name(tmp_path, method):
    """Before a weight is read: of some kinds the codes have the shapes of the weights, and would be
    taken for them."""
    load_config(ModelSection(init=tiny("llama"))).save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": method}
    (tmp_path / "config.json").write_text(json.dumps(told))
    name = method.get("quant_method", "of no name")
    with pytest.raises(DataError, match=rf"quantised weights \(quantization_config: {name}\)"):
        load_config(ModelSection(path=str(tmp_path)))
