"""Architecture families (paper, section 2 and Figure 1) by the names of timm's architectures and transformers' types.

Nothing else is believed: a repository may be called anything.
"""

from functools import cache


TRANSFORMER, CONVNET, HYBRID, OTHER, UNKNOWN = "Transformer", "ConvNet", "Hybrid", "Other", "unknown"
GROUPS = (TRANSFORMER, CONVNET, HYBRID, OTHER, UNKNOWN)

# (family, group) -> how the names begin. After a word there is no letter, unless it ends in "*"; of several that fit,
# the longest counts. The family "other" has the architectures that are known and none of the paper's.
BEGINNINGS = {
    # ResNets and their direct variants: pre-activation, wider, grouped, squeezed, split, without normalization.
    ("resnet", CONVNET): (
        "resnet* resnext* resnest* res2ne* seresne* skresne* ecaresne* eca_resne* gcresne* cspresne* bat_resnext* "
        "wide_resnet* legacy_seresne* nf_resnet nf_ecaresnet nf_seresnet tresnet* test_resnet bit"
    ),
    ("convnext", CONVNET): "convnext* test_convnext* dinov3_convnext",
    ("efficientnet", CONVNET): "efficientnet* tf_efficientnet* gc_efficientnet* test_efficientnet*",
    ("swin", TRANSFORMER): "swin* donut_swin maskformer_swin",
    ("beit", TRANSFORMER): "beit* data2vec_vision",
    ("deit", TRANSFORMER): "deit*",
    # The plain ViT: under all its training methods, with a head for another task, or in an image-text model.
    ("vit", TRANSFORMER): (
        "vit vit_* vitmatte vitdet vitpose* test_vit* flexivit naflexvit* samvit vivit videomae* videomt videoprism* "
        "vjepa* ijepa dino dinov2* dinov3_vit* aimv2* siglip* eva eva02 clip clip_* clipseg* chinese_clip* altclip* "
        "xclip* metaclip* depth_anything* prompt_depth_anything* depth_pro* dpt eomt* owlv2* owlvit* pixio sapiens* "
        "chmv2* tipsv2* mlcd* seggpt radio trocr sam sam_* sam3* sam_hq* sam3_detr* yolos lw_detr* rf_detr* "
        "internvl_vision deepseek_vit* gemma4_vit* qwen3_vit* qwen*_vit*"
    ),
    # Convolutions and self-attention side by side: a ViT on a convolutional stem, a detection transformer on a
    # ConvNet, a ResNet with attention in its last stages. A transformer whose only convolutions embed or merge patches
    # is none, nor is a ConvNet with channel attention.
    ("hybrid", HYBRID): (
        "vit_base_r* vit_large_r* vit_small_r* vit_tiny_r* vit_base_mci* vit_hybrid coat coatnet* coatnext* cvt "
        "maxvit* test_coatnet* test_maxvit* maxxvit* mobilevit* efficientformer* efficientvit* fastvit* levit* "
        "edgenext* nextvit* caformer* lowformer* shvit* swiftformer* visformer* vitamin* tiny_vit* csatv2* cpubone* "
        "iformer* mobilenetv4_hybrid* mobilenetv5* lambda_resne* lamhalobotnet* botnet* eca_botnext* sebotnet* "
        "halonet* halo2botnet* haloregnetz* eca_halonext* sehalonet* detr conditional_detr dab_detr deformable_detr "
        "rt_detr* table_transformer pp_doclayout* d_fine* deimv2 efficientloftr layoutlmv2"
    ),
    ("other", CONVNET): (
        "vgg* densenet* mobilenet* mobileone* inception* xception* legacy_xception* regnet* nfnet* eca_nfnet* "
        "dm_nfnet* nf_regnet* nasnet* pnasnet* mnasnet* semnasnet* spnasnet* googlenet alexnet lenet* squeezenet* "
        "shufflenet* ghostnet* repghostnet* hrnet* highresnet hgnet* dla* dpn* darknet* sedarknet* cspdarknet* cs3* "
        "cspnext* vovnet* ese_vovnet* eca_vovnet* repvgg* repvit* gernet* rexnet* rexnetr* fbnet* hardcorenas* lcnet* "
        "mixnet* tf_mixnet* tf_mobilenet* tinynet* selecsls* fasternet* starnet* rdnet* convmixer* convformer* "
        "focalnet* mambaout* senet* legacy_senet* test_byobnet* test_nfnet* test_mambaout* yolov* u2net unet* isnet "
        "deeplab* fcn cnn convnet* retinanet ssd centernet textnet uvdoc* superpoint pp_hgnet* pp_lcnet* pp_ocrv* "
        "speecht5_hifigan encodec dac univnet slanet dcgan"
    ),
    ("other", TRANSFORMER): (
        "cait* convit* crossvit* davit* gcvit* groupvit* hiera* sam2* edgetam* mvitv2* pvt* twins* xcit* volo* nest "
        "pit tnt mgp_str vits superglue lightglue segformer glpn dinat timesformer perceiver imagegpt wav2vec2* "
        "whisper hubert wavlm unispeech* audio_spectrogram_transformer data2vec_audio musicgen* speecht5 "
        "seamless_m4t* speech_to_text kyutai_speech_to_text parakeet* moonshine* patchtst timesfm* "
        "time_series_transformer decision_transformer sew sew_d clap* bark informer autoformer"
    ),
    # Tokens mixed by matrices, pooling, recurrence or state spaces; graphs.
    ("other", OTHER): (
        "mixer* gmixer* resmlp* gmlp* mlp sequencer2d* poolformer* efficientvim* vmamba mambavision lstm gru gcn gin "
        "gnn"
    ),
    ("language", OTHER): "rwkv* mamba mamba2 falcon_mamba recurrent_gemma xlstm",
}
_BY_WORD = {
    word.removesuffix("*"): (place, word.endswith("*"))
    for place, words in BEGINNINGS.items()
    for word in words.split()
}
_LENGTHS = sorted({len(word) for word in _BY_WORD}, reverse=True)
FAMILIES = (*dict.fromkeys(f for f, _ in BEGINNINGS if f != "other"), "other", UNKNOWN)


def family_of(*stated: str) -> tuple[str, str] | None:
    """Family and group by the first name that is known: of a timm architecture or a transformers model type.

    Args:
        stated: names, the model's own before those of the parts that it is built on.

    Returns:
        None where neither library knows any of them.
    """
    for architecture in stated:
        name = architecture.lower().replace("-", "_")
        for length in _LENGTHS:
            place, open_end = _BY_WORD.get(name[:length], (None, False))
            if place is not None and (open_end or not name[length : length + 1].isalpha()):
                return place
    return ("language", TRANSFORMER) if language_types().intersection(stated) else None


@cache
def language_types() -> frozenset[str]:
    """The model types that transformers lists for text, alone or with images in front of it."""
    from transformers.models.auto import modeling_auto  # here: it is large

    tasks = ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQUENCE_CLASSIFICATION")
    return frozenset(name for task in tasks for name in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES"))
