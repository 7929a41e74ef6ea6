"""Translation with a native beam search: task ``lrn_translation``."""

from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from ..inference import BeamSearchGenerator, BeamSearchGeneratorWithAlignment


@register_task("lrn_translation", dataclass=TranslationConfig)
class LRNTranslationTask(TranslationTask):
    """fairseq's ``translation``, with this package's generators: sooner; in float32 the same results."""

    def build_generator(self, models, args, seq_gen_cls=None, extra_gen_cls_kwargs=None, **kwargs):
        """As fairseq's task does, with the generators of this package in place of fairseq's two."""
        if seq_gen_cls is None:
            seq_gen_cls = BeamSearchGenerator
            if getattr(args, "print_alignment", False):
                seq_gen_cls = BeamSearchGeneratorWithAlignment
                extra_gen_cls_kwargs = {
                    **(extra_gen_cls_kwargs or {}),
                    "print_alignment": args.print_alignment,
                }
        return super().build_generator(models, args, seq_gen_cls, extra_gen_cls_kwargs, **kwargs)
