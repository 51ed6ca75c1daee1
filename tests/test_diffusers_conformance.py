"""diffusers' own conformance suites, run on the scheduler and the pipelines.

The suites are in diffusers' repository but not in its package. Set `DIFFUSERS_SRC` to a checkout, of a version as near
to the installed one as can be had, and its tests run against the installed package:

    DIFFUSERS_SRC=~/diffusers python -m pytest tests/test_diffusers_conformance.py
"""

import importlib.util
import os
import sys
import tempfile
import unittest
import unittest.mock
import warnings
from functools import partial
from pathlib import Path
from types import ModuleType

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from peft import LoraConfig
from tiny_text import BETAS, tiny_sd, tiny_sdxl

from pid_diffusers import OneStepPIDPipeline, OneStepPIDTextToImagePipeline, PIDScheduler

DIFFUSERS_SRC = os.environ.get("DIFFUSERS_SRC")
if not DIFFUSERS_SRC:
    pytest.skip("DIFFUSERS_SRC is not set to a checkout of diffusers", allow_module_level=True)

PACKAGE = "diffusers_conformance"


def load_suites() -> tuple[ModuleType, ModuleType, ModuleType, ModuleType]:
    """
    The modules of the scheduler tests, the pipeline tests, the pipelines' parameters and the LoRA tests in the
    checkout's `tests`.

    That folder becomes a package of another name: its modules import each other relatively, and `tests` is anybody's.
    """
    folder = Path(DIFFUSERS_SRC).expanduser() / "tests"
    spec = importlib.util.spec_from_file_location(
        PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[PACKAGE])
    pytest.register_assert_rewrite(f"{PACKAGE}.schedulers", f"{PACKAGE}.pipelines", f"{PACKAGE}.lora")
    # The model tests that come along call this when imported, and it would slow down every other test of this process.
    importlib.import_module(f"{PACKAGE}.testing_utils").enable_full_determinism = lambda: None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)  # theirs are registered in their conftest
        return (
            importlib.import_module(f"{PACKAGE}.schedulers.test_schedulers"),
            importlib.import_module(f"{PACKAGE}.pipelines.test_pipelines_common"),
            importlib.import_module(f"{PACKAGE}.pipelines.pipeline_params"),
            importlib.import_module(f"{PACKAGE}.lora.utils"),
        )


# The suites' classes stay in their modules: pytest would collect them here.
schedulers, pipelines, pipeline_params, lora = load_suites()


class PIDSchedulerTests(schedulers.SchedulerCommonTest):
    scheduler_classes = (PIDScheduler,)
    forward_default_kwargs = (("num_inference_steps", 10),)

    def get_scheduler_config(self, **kwargs):
        return {"num_train_timesteps": 250, "sigma_min": 0.002, "sigma_max": 80.0, **kwargs}

    @unittest.skip("PIDScheduler's noise levels are EDM's grid; it has no betas.")
    def test_trained_betas(self):
        pass

    def test_num_train_timesteps(self):
        for num_train_timesteps in [10, 50, 250, 1000]:
            self.check_over_configs(num_train_timesteps=num_train_timesteps)

    def test_noise_levels(self):
        for sigma_min, sigma_max in [(0.002, 80.0), (0.03, 14.6146), (0.01, 157.4)]:
            self.check_over_configs(sigma_min=sigma_min, sigma_max=sigma_max)

    def test_prediction_type(self):
        for prediction_type in ["sample", "edm", "epsilon", "v_prediction"]:
            self.check_over_configs(prediction_type=prediction_type)

    def test_timestep_type(self):
        for timestep_type in ["edm", "edm_scaled"]:
            self.check_over_configs(timestep_type=timestep_type)

    def test_inference_steps(self):
        for num_inference_steps in [1, 10, 50]:
            self.check_over_forward(num_inference_steps=num_inference_steps)


class OneStepPIDPipelineTests(pipelines.PipelineTesterMixin, unittest.TestCase):
    pipeline_class = OneStepPIDPipeline
    params = pipeline_params.UNCONDITIONAL_IMAGE_GENERATION_PARAMS
    batch_params = pipeline_params.UNCONDITIONAL_IMAGE_GENERATION_BATCH_PARAMS
    # There is no prompt: batch_size and class_labels say how many images.
    required_optional_params = pipelines.PipelineTesterMixin.required_optional_params - {"num_images_per_prompt"} | {
        "batch_size",
        "class_labels",
        "sigmas",
        "callback_on_step_end",
        "callback_on_step_end_tensor_inputs",
    }
    test_layerwise_casting = True
    test_group_offloading = True

    num_class_embeds = None

    def get_dummy_components(self):
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            num_class_embeds=self.num_class_embeds,
        )
        return {"unet": unet.eval(), "scheduler": PIDScheduler(), "vae": None}

    def get_dummy_inputs(self, device, seed=0):
        return {
            "batch_size": 1,
            "generator": torch.Generator(device).manual_seed(seed),
            "num_inference_steps": 1,
            "output_type": "np",
        }


class ClassConditionalOneStepPIDPipelineTests(OneStepPIDPipelineTests):
    params = pipeline_params.CLASS_CONDITIONED_IMAGE_GENERATION_PARAMS
    batch_params = pipeline_params.CLASS_CONDITIONED_IMAGE_GENERATION_BATCH_PARAMS
    num_class_embeds = 10

    def get_dummy_inputs(self, device, seed=0):
        inputs = super().get_dummy_inputs(device, seed)
        del inputs["batch_size"]  # the labels say it
        return {"class_labels": 3, **inputs}


def text_to_image_components(create, **guidance) -> dict:
    """Those of a tiny teacher with the scheduler of a student."""
    teacher = create()
    components = {name: part for name, part in teacher.components.items() if name != "image_encoder"}
    components |= {name: components.get(name) for name in OneStepPIDTextToImagePipeline._optional_components}
    levels = {"sigma_min": 0.029, "sigma_max": 14.6, "sigma_data": 1.0}
    scheduler = PIDScheduler(prediction_type="residual", timestep_type="discrete", **levels, **BETAS, **guidance)
    return {**components, "scheduler": scheduler}


class OneStepPIDTextToImagePipelineTests(pipelines.PipelineTesterMixin, unittest.TestCase):
    pipeline_class = OneStepPIDTextToImagePipeline
    # Guidance is no second network call, so that there are no negative embeddings.
    params = pipeline_params.TEXT_TO_IMAGE_PARAMS - {"negative_prompt_embeds"}
    # A negative prompt is refused.
    batch_params = frozenset({"prompt"})
    required_optional_params = pipelines.PipelineTesterMixin.required_optional_params | {
        "sigmas",
        "callback_on_step_end",
        "callback_on_step_end_tensor_inputs",
    }
    test_layerwise_casting = True
    test_group_offloading = True

    def get_dummy_components(self):
        # the UNet is told w
        return text_to_image_components(partial(tiny_sd, time_cond_proj_dim=16), guidance_range=[1.0, 10.0])

    def get_dummy_inputs(self, device, seed=0):
        return {
            "prompt": "a red fox",
            "generator": torch.Generator(device).manual_seed(seed),
            "num_inference_steps": 1,
            "output_type": "np",
        }

    def test_encode_prompt_works_in_isolation(self):
        # The suite reads what encode_prompt returns from the source of a class that it looks up among diffusers' own.
        name = self.pipeline_class.__name__
        with unittest.mock.patch.object(diffusers.pipelines, name, self.pipeline_class, create=True):
            super().test_encode_prompt_works_in_isolation()


class XLOneStepPIDTextToImagePipelineTests(OneStepPIDTextToImagePipelineTests):
    def get_dummy_components(self):
        return text_to_image_components(tiny_sdxl)  # w is baked in

    @unittest.skip("guidance_scale cannot be chosen where w is baked in; the pipeline says so.")
    def test_cfg(self):
        pass

    @unittest.skip("guidance_scale cannot be chosen where w is baked in; the pipeline says so.")
    def test_callback_cfg(self):
        pass

    @unittest.skip("text_encoder_2 is optional for Stable Diffusion 1.x and 2.x alone; the pipeline says so.")
    def test_save_load_optional_components(self):
        pass


class XLOneStepPIDTextToImageLoraTests(lora.PeftLoraLoaderMixinTests, unittest.TestCase):
    pipeline_class = OneStepPIDTextToImagePipeline
    scheduler_cls = PIDScheduler
    has_two_text_encoders = True
    unet_kwargs = {"sample_size": 8}  # the suite reads of them that the network is a UNet
    output_shape = (1, 16, 16, 3)
    create = staticmethod(tiny_sdxl)

    @classmethod
    def setUpClass(cls):
        # transformers saves beside an adapter where its text encoder was loaded from
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.create().save_pretrained(folder.name)
        cls.load = partial(DiffusionPipeline.from_pretrained, folder.name)

    def get_dummy_components(self, scheduler_cls=None, use_dora=False, lora_alpha=None):
        settings = {"r": 4, "lora_alpha": lora_alpha or 4, "init_lora_weights": False, "use_dora": use_dora}
        text, denoiser = (
            LoraConfig(target_modules=modules, **settings)
            for modules in (self.text_encoder_target_modules, self.denoiser_target_modules)
        )
        return text_to_image_components(self.load), text, denoiser

    def get_dummy_inputs(self, with_generator=True):
        inputs = {"prompt": "a red fox", "num_inference_steps": 1, "output_type": "np"}
        if with_generator:
            inputs["generator"] = torch.manual_seed(0)
        return torch.zeros(1, 4, 8, 8), torch.zeros(1, 12, dtype=torch.long), inputs

    @unittest.skip("The suite gives both text encoders one LoraConfig, in which transformers keeps the second's path.")
    def test_simple_inference_save_pretrained_with_text_lora(self):
        pass

    @unittest.skip("Keys that belong to no network are refused, not ignored.")
    def test_logs_info_when_no_lora_keys_found(self):
        pass


class OneStepPIDTextToImageLoraTests(XLOneStepPIDTextToImageLoraTests):
    has_two_text_encoders = False
    create = staticmethod(tiny_sd)
    test_simple_inference_save_pretrained_with_text_lora = (
        lora.PeftLoraLoaderMixinTests.test_simple_inference_save_pretrained_with_text_lora
    )

    # The suite asks the class whether there is a second text encoder; Stable Diffusion XL's test has it.
    test_lora_adapter_metadata_is_loaded_correctly_0 = None
    test_lora_adapter_metadata_is_loaded_correctly_1 = None
    test_lora_adapter_metadata_is_loaded_correctly_2 = None
