import copy
import gc
import itertools
import json
import os
import resource
import shutil
import signal
import weakref
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import ConsistencyModelPipeline, DiffusionPipeline, EDMEulerScheduler, UNet2DModel
from safetensors.torch import load_file

from pid_diffusers import InputError, OneStepPIDPipeline, PIDLoss, TrajectoryModel
from pid_diffusers.evaluation.report import RunReport
from pid_diffusers.evaluation.same_seed import same_seed_samples
from pid_diffusers.hub.push import repository_files
from pid_diffusers.training import Trainer, TrainingConfig, TrainingStopped, parse_config
from pid_diffusers.training.checkpoints import STATE_FILE, list_checkpoints
from pid_diffusers.training.noise import draw_batch

UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "num_class_embeds": 3,
}


@pytest.fixture(autouse=True)
def one_run_a_test():
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teacher")
    ConsistencyModelPipeline(UNet2DModel(**UNET), EDMEulerScheduler()).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def settings(teacher, tmp_path):
    return {
        "teacher": teacher,
        "output_dir": str(tmp_path / "run"),
        "train_batch_size": 4,
        "max_train_steps": 6,
        "num_train_timesteps": 10,
        "learning_rate": 1e-3,
        "checkpointing_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "num_validation_images": 2,
        "num_eval_samples": 4,
        "ema_decays": [0.5, 0.9],
    }


def train(settings, validate=None, **changes):
    AcceleratorState._reset_state(True)
    return Trainer(TrainingConfig(**{**settings, **changes}).validate()).train(validate)


def weights(folder):
    return load_file(os.path.join(folder, "unet", "diffusion_pytorch_model.safetensors"))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def metrics(folder):
    return [json.loads(line) for line in open(os.path.join(folder, "metrics.jsonl"))]


def test_a_run_ends_with_a_pipeline_that_generates_from_the_moving_average(settings):
    result = train(settings)
    pipe = DiffusionPipeline.from_pretrained(settings["output_dir"])
    assert isinstance(pipe, OneStepPIDPipeline)
    assert same(pipe.unet.state_dict(), result.student.unet.state_dict())
    saved = load_file(os.path.join(settings["output_dir"], "checkpoint-6", "ema-0.9.safetensors"))
    assert same(dict(pipe.unet.named_parameters()), saved)
    trained = load_file(os.path.join(settings["output_dir"], "checkpoint-6", "model.safetensors"))
    assert not same(saved, trained)
    assert len(pipe(class_labels=[0, 1, 2]).images) == 3


def test_the_moving_average_is_that_of_its_definition(settings):
    train(settings, max_train_steps=3, checkpointing_steps=1, ema_decays=[0.9], gradient_accumulation_steps=1)
    initial = load_file(os.path.join(settings["teacher"], "unet", "diffusion_pytorch_model.safetensors"))
    average = {name: value.double() for name, value in initial.items()}
    for step in (1, 2, 3):
        now = load_file(os.path.join(settings["output_dir"], f"checkpoint-{step}", "model.safetensors"))
        average = {name: 0.9 * average[name] + 0.1 * now[name].double() for name in average}
    saved = load_file(os.path.join(settings["output_dir"], "checkpoint-3", "ema-0.9.safetensors"))
    for name in average:
        torch.testing.assert_close(saved[name].double(), average[name], atol=1e-6, rtol=1e-5)


def test_save_ema_decay_chooses_the_average_that_is_saved(settings):
    train(settings, save_ema_decay=0.5)
    saved = load_file(os.path.join(settings["output_dir"], "checkpoint-6", "ema-0.5.safetensors"))
    assert same(weights(settings["output_dir"]), saved)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_and_resuming_ends_with_the_same_bits(settings, tmp_path, signal_number, capsys):
    straight = train(settings)
    settings["output_dir"] = str(tmp_path / "interrupted")
    interrupted = train(
        settings,
        lambda student, teacher, step: os.kill(os.getpid(), signal_number) or {},
        validation_steps=3,
        checkpointing_steps=100,
    )
    assert interrupted.interrupted_by == signal_number
    assert interrupted.steps == 3
    checkpoint = os.path.join(settings["output_dir"], "checkpoint-3")
    assert checkpoint in capsys.readouterr().out
    assert not os.path.exists(os.path.join(settings["output_dir"], "model_index.json"))
    resumed = train(settings, resume_from_checkpoint="latest")
    assert resumed.steps == straight.steps
    assert same(resumed.student.unet.state_dict(), straight.student.unet.state_dict())
    assert [line["step"] for line in metrics(settings["output_dir"])] == [1, 2, 3, 4, 5, 6]


def test_resuming_is_exact_with_accumulation_warmup_cosine_radam_and_clipping(settings, tmp_path):
    options = {
        "gradient_accumulation_steps": 2,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
        "optimizer": "radam",
        "max_grad_norm": 0.1,
    }
    straight = train(settings, **options)
    checkpoint = os.path.join(settings["output_dir"], "checkpoint-2")
    settings["output_dir"] = str(tmp_path / "resumed")
    resumed = train(settings, resume_from_checkpoint=checkpoint, **options)
    assert same(resumed.student.unet.state_dict(), straight.student.unet.state_dict())


def test_validation_sees_the_weights_that_are_saved(settings):
    seen = {}

    def validate(student, teacher, step):
        seen[step] = {name: value.clone() for name, value in student.unet.named_parameters()}
        return {}

    result = train(settings, validate, validation_steps=2)
    assert sorted(seen) == [2, 4, 6]
    for step, shown in seen.items():
        path = os.path.join(settings["output_dir"], f"checkpoint-{step}", "ema-0.9.safetensors")
        assert same(shown, load_file(path))
    assert same(seen[6], dict(result.student.unet.named_parameters()))


def validations(folder):
    return [json.loads(line) for line in open(os.path.join(folder, "validation.jsonl"))]


def test_a_resumed_run_has_the_validations_of_one_that_was_not_interrupted(settings, tmp_path):
    def validated(**changes):
        AcceleratorState._reset_state(True)
        config = TrainingConfig(**{**settings, "validation_steps": 5, "num_validation_samples": 3, **changes})
        Trainer(config.validate()).train(RunReport(config).validate)
        return [{k: v for k, v in line.items() if k != "seconds"} for line in validations(config.output_dir)]

    straight = validated()
    assert [line["step"] for line in straight] == [5]
    assert all(0 < line["rms_distance"] < 10 and line["num_samples"] == 3 for line in straight)
    settings["output_dir"] = str(tmp_path / "resumed")
    assert len(validated(max_train_steps=5)) == 1  # which is cut back to the checkpoint of step 4
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-5")
    (tmp_path / "resumed" / "model_index.json").unlink()
    assert validated(resume_from_checkpoint="latest") == straight


def test_validation_figures_are_of_as_many_seeds_as_asked_for_and_the_teacher_is_solved_once(settings):
    config = TrainingConfig(**settings, validation_steps=3, num_validation_samples=5, validation_class_labels=[2, 2])
    trainer = Trainer(config.validate())
    seen = []

    def validate(student, teacher, step):
        calls = []
        hook = teacher.unet.register_forward_hook(lambda *_: calls.append(1))
        figures = report.validate(student, teacher, step)
        hook.remove()
        expected = same_seed_samples(student, teacher, 5, seed=0)
        seen.append((figures["rms_distance"], expected.rms_distance, len(calls)))
        return figures

    report = RunReport(config)
    trainer.train(validate)
    (first, expected_first, calls), (second, expected_second, calls_later) = seen
    assert (first, second) == (expected_first, expected_second)
    assert first != second
    assert calls - calls_later == 2 * 80  # 40 Heun steps for the picture's seeds and for the figures'


def test_validation_does_not_change_training(settings, tmp_path):
    without = train(settings)
    settings["output_dir"] = str(tmp_path / "validated")
    config = TrainingConfig(**settings, validation_steps=1).validate()
    AcceleratorState._reset_state(True)
    validated = Trainer(config).train(RunReport(config).validate)
    assert same(without.student.unet.state_dict(), validated.student.unet.state_dict())
    assert os.path.exists(os.path.join(settings["output_dir"], "validation", "step-0000006.png"))


def test_accumulated_micro_steps_give_the_gradient_of_their_mean(settings):
    trainer = Trainer(TrainingConfig(**settings, gradient_accumulation_steps=3, max_grad_norm=None).validate())
    student, teacher = TrajectoryModel(copy.deepcopy(trainer.unet), trainer.scheduler), trainer.teacher
    losses = []
    for micro_step in range(3):
        z, indices, generator = draw_batch((4, 1, 8, 8), 80.0, 10, (0, 0, 0, micro_step), "cpu")
        condition = teacher.draw_condition(4, generator)
        losses.append(PIDLoss()(student, teacher, z, indices, **condition).mean())
    mean = torch.stack(losses).mean()
    mean.backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in student.unet.parameters()])
    trainer.train()
    first = metrics(settings["output_dir"])[0]
    assert first["loss"] == pytest.approx(mean.item(), rel=1e-5)
    assert first["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_accumulation_is_that_of_the_settings_whatever_the_launcher_or_a_checkpoint_says(settings, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    train(settings, max_train_steps=3, checkpointing_steps=1)
    train(
        settings,
        checkpointing_steps=1,
        gradient_accumulation_steps=2,
        resume_from_checkpoint="latest",
        logging_steps=1,
    )
    saved = [load_file(path / "model.safetensors") for path in list_checkpoints(Path(settings["output_dir"]))]
    assert len(saved) == 6
    assert not any(same(a, b) for a, b in itertools.pairwise(saved))


def test_the_learning_rate_follows_warmup_and_decay_over_optimizer_steps(settings):
    train(settings, lr_scheduler="linear", lr_warmup_steps=2, gradient_accumulation_steps=2)
    rates = [line["learning_rate"] for line in metrics(settings["output_dir"])]
    assert rates == pytest.approx([0.0, 0.5e-3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_only_the_newest_checkpoints_are_kept(settings):
    train(settings, checkpoints_total_limit=2, checkpointing_steps=1)
    assert [path.name for path in list_checkpoints(Path(settings["output_dir"]))] == ["checkpoint-5", "checkpoint-6"]


def test_a_student_of_another_shape_learns_and_is_saved(settings, tmp_path):
    config = tmp_path / "small.json"
    config.write_text(json.dumps({**UNET, "block_out_channels": (4, 8), "num_class_embeds": 3}))
    train(settings, student_config=str(config))
    pipe = DiffusionPipeline.from_pretrained(settings["output_dir"])
    assert tuple(pipe.unet.config.block_out_channels) == (4, 8)
    assert len(pipe(class_labels=[0, 1]).images) == 2


@pytest.mark.parametrize("options", [{"mixed_precision": "bf16"}, {"split_batch": True}, {"report_to": "tensorboard"}])
def test_options_of_computation_train(settings, options):
    result = train(settings, **options)
    assert result.skipped_steps == 0
    assert all(parameter.dtype == torch.float32 for parameter in result.student.unet.parameters())
    assert all(torch.isfinite(parameter).all() for parameter in result.student.unet.parameters())


def test_gradient_checkpointing_changes_no_bit(settings, tmp_path):
    plain = train(settings)
    settings["output_dir"] = str(tmp_path / "checkpointed")
    checkpointed = train(settings, gradient_checkpointing=True)
    assert same(plain.student.unet.state_dict(), checkpointed.student.unet.state_dict())


def test_dropout_of_the_teacher_is_not_the_students(settings, tmp_path, teacher):
    torch.manual_seed(0)
    folder = str(tmp_path / "dropout-teacher")
    ConsistencyModelPipeline(UNet2DModel(**UNET, dropout=0.5), EDMEulerScheduler()).save_pretrained(folder)
    with_dropout = train(settings, teacher=folder)
    settings["output_dir"] = str(tmp_path / "without")
    without = train(settings)
    assert same(with_dropout.student.unet.state_dict(), without.student.unet.state_dict())


class FailingLoss(torch.nn.Module):
    """A loss to which `failure` is done at some of its calls, counted from 0."""

    def __init__(self, loss, failing, failure=lambda value: value * float("nan")):
        super().__init__()
        self.loss, self.failing, self.failure, self.calls = loss, failing, failure, 0

    def forward(self, *args, **kwargs):
        value = self.loss(*args, **kwargs)
        self.calls += 1
        return self.failure(value) if self.calls - 1 in self.failing else value


def train_and_see_changes(trainer):
    """The result, and for each step from the second on whether it changed the moving average."""
    seen = []

    def validate(student, teacher, step):
        seen.append([parameter.clone() for parameter in student.unet.parameters()])
        return {}

    result = trainer.train(validate)
    return result, [
        any(not torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(seen)
    ]


def test_nonfinite_steps_are_skipped_and_counted(settings):
    trainer = Trainer(TrainingConfig(**settings, validation_steps=1).validate())
    trainer.loss = FailingLoss(trainer.loss, {1, 2})
    result, changed = train_and_see_changes(trainer)
    assert (result.steps, result.skipped_steps) == (6, 2)
    assert changed == [False, False, True, True, True]
    assert [line["skipped_steps"] for line in metrics(settings["output_dir"])] == [0, 1, 2, 2, 2, 2]


class HalfPrecisionTrainer(Trainer):
    """A trainer in the state that accelerate sets up for fp16 on a GPU; torch has what it takes for the CPU, too."""

    def _create_accelerator(self):
        accelerator = super()._create_accelerator()
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.scaler = torch.amp.GradScaler("cpu")
        return accelerator


def half_precision_trainer(settings, **changes):
    AcceleratorState._reset_state(True)
    return HalfPrecisionTrainer(TrainingConfig(**{**settings, **changes}).validate())


def test_half_precision_trains_float32_weights_and_resumes_to_the_same_bits(settings, tmp_path):
    straight = half_precision_trainer(settings).train()
    assert straight.skipped_steps == 0
    assert all(parameter.dtype == torch.float32 for parameter in straight.student.unet.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in straight.teacher.parameters())
    single = train({**settings, "output_dir": str(tmp_path / "float32")})
    assert not same(straight.student.unet.state_dict(), single.student.unet.state_dict())
    for a, b in zip(straight.student.unet.parameters(), single.student.unet.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=5e-3, rtol=0)

    part = {**settings, "output_dir": str(tmp_path / "part")}
    half_precision_trainer(part, max_train_steps=2).train()
    resumed = half_precision_trainer(part, resume_from_checkpoint="latest")
    assert same(resumed.train().student.unet.state_dict(), straight.student.unet.state_dict())
    with pytest.raises(InputError, match="another mixed_precision .fp16 there, no here"):
        train(part, resume_from_checkpoint="latest")


def test_an_infinite_loss_with_a_gradient_scaler_changes_no_weight(settings):
    trainer = half_precision_trainer(settings, validation_steps=1)
    trainer.loss = FailingLoss(trainer.loss, {2}, lambda value: value + float("inf"))  # the gradient stays finite
    result, changed = train_and_see_changes(trainer)
    assert (result.steps, result.skipped_steps) == (6, 1)
    assert changed == [True, False, True, True, True]


def test_when_a_run_is_measured_the_optimizers_state_and_the_averages_are_gone(settings):
    trainer = Trainer(TrainingConfig(**settings).validate())
    left = []

    def note(student, teacher, step):
        state = next(iter(trainer.optimizer.state.values()))
        left[:] = [weakref.ref(state["exp_avg"]), weakref.ref(trainer.emas[0.9].shadow_params[0])]
        return {}

    trainer.config.validation_steps = 6
    trainer.train(note)
    gc.collect()
    assert len(left) == 2 and [reference() for reference in left] == [None, None]


def test_a_run_that_learns_nothing_saves_nothing(settings):
    trainer = Trainer(TrainingConfig(**settings).validate())
    trainer.loss = FailingLoss(trainer.loss, range(100))
    with pytest.raises(TrainingStopped, match="not finite in any of the 6 steps"):
        trainer.train()
    assert not (Path(settings["output_dir"]) / "model_index.json").exists()


def test_too_many_nonfinite_steps_stop_the_run_and_name_the_last_checkpoint(settings):
    trainer = Trainer(TrainingConfig(**settings, max_skipped_steps=2).validate())
    trainer.loss = FailingLoss(trainer.loss, range(3, 100))
    with pytest.raises(TrainingStopped, match="2 steps in a row.*checkpoint-4"):
        trainer.train()
    checkpoint = list_checkpoints(Path(settings["output_dir"]))[-1]
    assert all(torch.isfinite(value).all() for value in load_file(checkpoint / "model.safetensors").values())


def test_a_full_disk_costs_no_earlier_checkpoint(settings, caplog):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def validate(student, teacher, step):
        # from step 3 on no file can grow beyond 10 kB, as if the disk were full; from step 5 on there is room again
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]) if step == 3 else limits)
        return {}

    try:
        result = train(settings, validate, validation_steps=1, checkpointing_steps=2, logging_steps=10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.steps == 6
    assert "checkpoint of step 4 could not be written" in caplog.text
    assert [path.name for path in list_checkpoints(Path(settings["output_dir"]))] == ["checkpoint-2", "checkpoint-6"]
    assert not list(Path(settings["output_dir"]).glob(".*"))


def test_a_checkpoint_that_cannot_be_written_costs_no_earlier_one(settings, caplog):
    def block(student, teacher, step):
        # a file where the next checkpoint's folder would be made
        (Path(settings["output_dir"]) / ".checkpoint-4.partial").write_text("in the way")
        return {}

    result = train(settings, block, validation_steps=2)
    assert result.steps == 6
    assert "checkpoint of step 4 could not be written" in caplog.text
    assert [path.name for path in list_checkpoints(Path(settings["output_dir"]))] == ["checkpoint-2", "checkpoint-6"]


def test_an_incomplete_checkpoint_is_not_the_latest(settings):
    straight = train(settings)
    folder = Path(settings["output_dir"])
    os.truncate(folder / "checkpoint-6" / "optimizer.bin", 100)
    (folder / "checkpoint-4" / STATE_FILE).unlink()
    (folder / ".checkpoint-5.partial").mkdir()
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2"]
    resumed = train(settings, resume_from_checkpoint="latest")
    assert same(resumed.student.unet.state_dict(), straight.student.unet.state_dict())
    assert not (folder / ".checkpoint-5.partial").exists()


def test_latest_without_a_checkpoint_starts_at_the_beginning(settings, tmp_path):
    straight = train(settings)
    settings["output_dir"] = str(tmp_path / "fresh")
    fresh = train(settings, resume_from_checkpoint="latest")
    assert same(fresh.student.unet.state_dict(), straight.student.unet.state_dict())


def test_resuming_a_finished_run_saves_its_pipeline_again(settings):
    train(settings)
    before = weights(settings["output_dir"])
    shutil.rmtree(os.path.join(settings["output_dir"], "unet"))
    train(settings, resume_from_checkpoint="latest")
    assert same(weights(settings["output_dir"]), before)


BAD_INPUT = {
    "missing teacher": ({"teacher": "/nonexistent/teacher"}, "teacher is '/nonexistent/teacher'"),
    "labels out of range": ({"validation_class_labels": [0, 3]}, r"validation_class_labels is \[0, 3\].*0 to 2"),
    "labels of the wrong length": ({"validation_class_labels": [0]}, r"validation_class_labels is \[0\].*2 images"),
    "sigma_min above the teacher's range": ({"sigma_min": 90.0}, "sigma_min is 90.0 and sigma_max is 80.0"),
    "sigma_min above sigma_max": ({"sigma_min": 2.0, "sigma_max": 1.0}, "sigma_min is 2.0.*below sigma_max, 1.0"),
    "one grid point": ({"num_train_timesteps": 1}, "num_train_timesteps is 1"),
    "unknown head": ({"prediction_type": "noise"}, "prediction_type is 'noise'.*epsilon"),
    "unknown scheme": ({"scheme": "downwind"}, "scheme is 'downwind'.*midpoint"),
    "unknown distance": ({"distance": "l3"}, "distance is 'l3'.*pseudo_huber"),
    "no batch": ({"train_batch_size": 0}, "train_batch_size is 0"),
    "no steps": ({"max_train_steps": 0}, "max_train_steps is 0"),
    "a classifier of other images": ({"eval_classifier": "digits"}, "eval_classifier is 'digits'.*in 3 classes"),
    "a seed too large": ({"seed": 5_000_000_000}, "seed is 5000000000"),
    "a decay of 1.5": ({"adam_beta1": 1.5}, "adam_beta1 is 1.5"),
    "a grid beyond floats": ({"rho": 1e-3}, "rho is 0.001"),
    "fp16 on a CPU": ({"mixed_precision": "fp16"}, "mixed_precision is 'fp16', which needs a GPU"),
    "unknown tracker": ({"report_to": "notebook"}, "report_to is 'notebook'"),
    "absent checkpoint": ({"resume_from_checkpoint": "/nonexistent"}, "resume_from_checkpoint is '/nonexistent'"),
    "unreadable student": ({"student_config": "/nonexistent.json"}, "student_config is '/nonexistent.json'"),
    "a file as output": ({"output_dir": __file__}, "output_dir is .*a file"),
    "unwritable output": ({"output_dir": "/proc/pid-model"}, "output_dir is '/proc/pid-model'.*cannot be written"),
    "missing VGG weights": (
        {"distance": "lpips", "lpips_vgg_weights": "/none.pth"},
        "lpips_vgg_weights is '/none.pth'",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_answered_in_one_sentence_before_anything_is_written(settings, changes, message):
    if changes.get("mixed_precision") == "fp16" and torch.cuda.is_available():
        pytest.skip("a GPU can do it")
    with pytest.raises(InputError, match=message) as caught:
        train(settings, **changes)
    assert "\n" not in str(caught.value)
    folder = Path(settings["output_dir"])
    assert not folder.exists() or not any(folder.iterdir())


@pytest.mark.parametrize(
    "student",
    [
        [1],
        {"_class_name": 5},
        {"_class_name": "pipelines"},
        {"_class_name": "AutoencoderKL"},
        {"block_out_channels": [7, 7]},
        {**UNET, "num_class_embeds": 4},
        {
            **UNET,
            "block_out_channels": [8] * 5,
            "down_block_types": ["DownBlock2D"] * 5,
            "up_block_types": ["UpBlock2D"] * 5,
        },
    ],
    ids=str,
)
def test_a_student_that_does_not_fit_is_answered_in_one_sentence(settings, tmp_path, student):
    (tmp_path / "student.json").write_text(json.dumps(student))
    with pytest.raises(InputError, match="student_config"):
        train(settings, student_config=str(tmp_path / "student.json"))


@pytest.mark.parametrize("config", [{"sample_size": None}, {"out_channels": 3}, {"sample_size": 9}])
def test_a_teacher_that_cannot_be_evaluated_is_answered_in_one_sentence(settings, tmp_path, config):
    folder = str(tmp_path / "odd")
    ConsistencyModelPipeline(UNet2DModel(**{**UNET, **config}), EDMEulerScheduler()).save_pretrained(folder)
    with pytest.raises(InputError, match="teacher is .*odd"):
        train(settings, teacher=folder)


def test_going_back_to_an_older_checkpoint_needs_the_newer_ones_out_of_the_way(settings):
    train(settings)
    folder = Path(settings["output_dir"])
    with pytest.raises(InputError, match="but checkpoint-6 is newer"):
        train(settings, resume_from_checkpoint="checkpoint-2")
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_optimizer_settings_that_change_at_a_resume_take_effect(settings, capsys):
    train(settings, max_train_steps=2)
    trainer = Trainer(
        TrainingConfig(**settings, resume_from_checkpoint="latest", adam_weight_decay=0.5, adam_beta1=0.5).validate()
    )
    trainer.train()
    newest = list_checkpoints(Path(settings["output_dir"]))[-1]
    (group,) = torch.load(newest / "optimizer.bin")["param_groups"]
    assert group["weight_decay"] == 0.5 and group["betas"] == (0.5, 0.999)
    assert "adam_weight_decay (0.0 → 0.5)" in capsys.readouterr().out


def test_the_settings_of_a_run_are_a_preset_in_which_an_absolute_path_is_its_last_part(settings):
    train(settings)
    again = parse_config(["--preset", str(Path(settings["output_dir"]) / "config.yaml")]).to_dict()
    names = {name: Path(settings[name]).name for name in ("output_dir", "teacher")}
    assert {**again, "preset": None} == {**TrainingConfig(**{**settings, **names}).to_dict(), "preset": None}


def test_nothing_that_is_pushed_names_a_folder_of_this_machine(settings):
    train(settings)
    files = [path for path in repository_files(settings["output_dir"]).values() if path.suffix != ".safetensors"]
    assert files and not [path for path in files if str(Path(settings["output_dir"]).parent) in path.read_text()]


def test_at_every_checkpoint_but_the_last_the_pipeline_is_saved_and_handed_out(settings):
    folder, seen = Path(settings["output_dir"]), []

    def on_checkpoint(result):
        saved = OneStepPIDPipeline.from_pretrained(folder).unet.state_dict()
        seen.append((result.steps, same(saved, result.student.unet.state_dict()), saved))

    trainer = Trainer(TrainingConfig(**{**settings, "checkpointing_steps": 2}).validate())
    result = trainer.train(on_checkpoint=on_checkpoint)
    assert [(step, equal) for step, equal, _ in seen] == [(2, True), (4, True)]
    assert not same(seen[0][2], seen[1][2])
    assert same(OneStepPIDPipeline.from_pretrained(folder).unet.state_dict(), result.student.unet.state_dict())


def test_handing_out_checkpoints_changes_nothing_of_the_training(settings, tmp_path):
    plain = train(settings, checkpointing_steps=2)
    trainer = Trainer(TrainingConfig(**{**settings, "checkpointing_steps": 2, "output_dir": str(tmp_path / "again")}))
    assert same(trainer.train(on_checkpoint=lambda result: None).student.state_dict(), plain.student.state_dict())


def test_a_folder_with_another_run_is_not_touched(settings):
    train(settings)
    before = {path: path.stat().st_mtime_ns for path in Path(settings["output_dir"]).rglob("*")}
    with pytest.raises(InputError, match="holds another run or model.*--resume_from_checkpoint latest"):
        train(settings)
    assert {path: path.stat().st_mtime_ns for path in Path(settings["output_dir"]).rglob("*")} == before


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"student_config": {**UNET, "block_out_channels": [4, 8]}}, "another network"),
        ({"student_config": {**UNET, "attention_head_dim": 4}}, "another network .attention_head_dim is 8 there, 4"),
        ({"num_train_timesteps": 11}, "another trajectory function.*num_train_timesteps is 10 there, 11 here"),
        ({"optimizer": "adamw"}, "another optimizer.*radam there, adamw here"),
        ({"ema_decays": [0.5]}, "another list of ema_decays"),
    ],
)
def test_a_checkpoint_of_another_student_is_refused(settings, tmp_path, changes, difference):
    train(settings)
    if "student_config" in changes:
        (tmp_path / "other.json").write_text(json.dumps(changes["student_config"]))
        changes = {"student_config": str(tmp_path / "other.json")}
    with pytest.raises(InputError, match=difference):
        train(settings, resume_from_checkpoint="latest", **changes)


def test_an_incomplete_checkpoint_is_refused_by_name(settings):
    train(settings)
    checkpoint = Path(settings["output_dir"]) / "checkpoint-4"
    (checkpoint / "optimizer.bin").unlink()
    with pytest.raises(InputError, match="not a complete checkpoint .optimizer.bin is missing"):
        train(settings, resume_from_checkpoint=str(checkpoint))
