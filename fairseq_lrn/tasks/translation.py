"""Translation with a native beam search: task ``lrn_translation``."""

from dataclasses import dataclass, field

from fairseq.dataclass import ChoiceEnum
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from ..inference import COMPUTE_TYPES, BeamSearchGenerator, BeamSearchGeneratorWithAlignment


@dataclass
class LRNTranslationConfig(TranslationConfig):
    """Options of the task ``lrn_translation``."""

    compute_type: ChoiceEnum(COMPUTE_TYPES) = field(  # type: ignore[valid-type]
        default="float32",
        metadata={
            "help": "type of the products with weights when an lrn model translates on the CPU; bfloat16 and "
            "int8 are faster but change some translations; it affects neither training nor checkpoints"
        },
    )


@register_task("lrn_translation", dataclass=LRNTranslationConfig)
class LRNTranslationTask(TranslationTask):
    """fairseq's ``translation`` with this package's generators: faster, and the same results in float32."""

    def build_generator(self, models, args, seq_gen_cls=None, extra_gen_cls_kwargs=None, **kwargs):
        """As fairseq's task does, with this package's two generators instead of fairseq's.

        Raises:
            ValueError: compute_type is not float32, and another generator is asked for
        """
        if seq_gen_cls is None:
            seq_gen_cls = BeamSearchGenerator
            if getattr(args, "print_alignment", False):
                seq_gen_cls = BeamSearchGeneratorWithAlignment
                extra_gen_cls_kwargs = {
                    **(extra_gen_cls_kwargs or {}),
                    "print_alignment": args.print_alignment,
                }
        generator = super().build_generator(models, args, seq_gen_cls, extra_gen_cls_kwargs, **kwargs)
        compute_type = str(getattr(self.cfg, "compute_type", "float32"))  # fairseq's options have none
        if isinstance(generator, BeamSearchGenerator):
            generator.compute_type = compute_type
        elif compute_type != "float32":
            kind = type(generator).__name__
            raise ValueError(f"--compute-type is {compute_type}, but must be float32 for a {kind}")
        return generator
