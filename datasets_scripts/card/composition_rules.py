"""What a public model is, by the words that say so: the rules for its family and group, its training data, its task.

The families and groups are those of the paper (section 2, Figure 1). Rules are ordered, and the first that fits
decides; which texts they are held against, and in which order, says `composition.py`.
"""

import re
from dataclasses import dataclass


TRANSFORMER, CONVNET, HYBRID, OTHER, UNKNOWN = "Transformer", "ConvNet", "Hybrid", "Other", "unknown"
GROUPS = (TRANSFORMER, CONVNET, HYBRID, OTHER, UNKNOWN)


@dataclass(frozen=True)
class FamilyRule:
    """Words that tell a family.

    Attributes:
        family, group: what they tell.
        pattern: the words, lower case, none of them part of a longer word ("vit" is not in "invite").
        stated_only: they are everyday words ("coat", "bit"): only a stated architecture is believed, no name.
    """

    family: str
    group: str
    pattern: re.Pattern
    stated_only: bool


def _rule(family: str, group: str, words: str, *, stated_only: bool = False) -> FamilyRule:
    return FamilyRule(family, group, re.compile(rf"(?<![a-z])(?:{'|'.join(words.split())})(?![a-z])"), stated_only)


FAMILY_RULES = (
    # --- Words of transformers that hold a hybrid's or another family's word.
    _rule("vit", TRANSFORMER, "yolos (rf|lw)[-_]?detr[a-z0-9_]*"),
    # --- Convolutions and self-attention side by side: a ViT on a convolutional stem, a detection transformer on a
    # ConvNet, a ResNet with attention in its last stages. A transformer whose only convolutions embed or merge patches
    # (PVT, Twins, Hiera) is none, nor is a ConvNet with channel attention (SE, ECA).
    _rule(
        "hybrid",
        HYBRID,
        r"""
        vit[-_][a-z]+[-_](r\d*|resnet\d+d?)([-_]s\d+)?[-_][p\d][\d_]* vit[-_]base[-_]mci (vit|dpt)[-_]hybrid coatnet
        coatnext cvt maxvit maxxvit(v2)? mobilevit(v2)? efficientformer(v2)? fastvit levit edgenext efficientvit
        nextvit caformer lowformer shvit swiftformer visformer vitamin tiny[-_]?vit csatv2 cpubone mobilenetv5
        mobilenetv4[-_]hybrid lambda[-_]resnet[a-z0-9]* [a-z]*(botnet|botnext|halonet|halonext)[a-z0-9]* haloregnetz
        lamhalobotnet[a-z0-9]* [a-z0-9_-]*detr[a-z0-9_]* table[-_]transformer[a-z-]* pp_doclayout[a-z0-9_]* deimv2
        d[-_]?fine (mask2?former|oneformer).*resnet efficientloftr layoutlmv2 layoutxlm
        """,
    ),
    _rule("hybrid", HYBRID, "coat iformer", stated_only=True),
    # --- The paper's families, before the models that have one of them as a backbone.
    _rule("swin", TRANSFORMER, "swin[bstl]? swin(v2|2sr|ir|unet|unetr|tr)[a-z]* (mm-)?grounding-dino"),
    _rule("beit", TRANSFORMER, "beit(v2|3)? data2vec[-_]vision dit[-_](base|large)"),
    _rule("deit", TRANSFORMER, "deit3?"),
    _rule("convnext", CONVNET, "convnext(v2)?[a-z]* dinov3_convnext"),
    _rule("efficientnet", CONVNET, "[a-z]*efficientnet(v2)?[a-z]* effnet(v2)?[a-z]*"),
    _rule("other", CONVNET, "inception[-_ ]?resnet highresnet dla.*res2ne[xt]*"),
    # ResNets and their direct variants: pre-activation, wider, grouped, squeezed, split, without normalization.
    _rule("resnet", CONVNET, "[a-z]*resnet[a-z]* [a-z]*resnext[a-z]* resnest res2net res2next"),
    _rule("resnet", CONVNET, "bit", stated_only=True),
    # --- Transformers for images whose stages, windows or attention are not the plain ViT's.
    _rule(
        "other",
        TRANSFORMER,
        r"""
        cait convit crossvit davit gcvit groupvit hiera hieradet mvitv2 pvt twins xcit volo segformer mit[-_]b\d glpn
        dinat timesformer sam2[a-z_]* edgetam[a-z_]* perceiver imagegpt
        """,
    ),
    _rule("other", TRANSFORMER, "nest pit tnt mgp-str vits superglue lightglue", stated_only=True),
    # --- The plain ViT: under all its training methods, with a head for another task, or in an image-text model.
    _rule(
        "vit",
        TRANSFORMER,
        r"""
        vit[bslhg]? vit(base|small|large|tiny|huge) vit_[a-z_]+ flexivit naflexvit samvit vivit videomae vjepa2
        i?jepa dino(v2|v3)?[a-z_]* aimv2[a-z_]* siglip2?[a-z_]* eva0?2 [a-z_-]*clip[a-z_]* metaclip_2[a-z_]*
        depth[-_]?anything prompt_depth_anything dpt depth_pro eomt[a-z0-9_]* videomt vitpose[a-z_]* vitmatte vitdet
        owlv2[a-z_]* owlvit[a-z_]* pixio sapiens2 chmv2 tipsv2[a-z_]* mlcd[a-z_]* seggpt videoprism[a-z_]* radio
        trocr
        """,
    ),
    _rule("vit", TRANSFORMER, "sam sam_[a-z_]+ sam3[a-z_]* eva internvl_vision", stated_only=True),
    # --- Other ConvNets, up to those of a transformer's outline that mix by convolutions (ConvFormer, FocalNet).
    _rule(
        "other",
        CONVNET,
        r"""
        vgg[a-z]* densenet[a-z]* [a-z]*mobilenet[a-z]* mobileone inception[a-z]* [a-z]*xception regnet[vxyz]?
        [a-z]*nfnet [a-z]*nasnet[a-z]* googlenet alexnet lenet squeezenet shufflenet[a-z]* ghostnet[a-z]* repghostnet
        hrnet hgnet[a-z]* dlax? dpn [a-z0-9]*darknet[a-z]* cspnext cs3[a-z_]* [a-z]*vovnet[a-z]* repvgg[a-z]* repvit
        gernet rexnetr? fbnet[a-z]* hardcorenas [a-z_]*lcnet[a-z]* mixnet tinynet selecsls fasternet starnet rdnet
        convmixer convformer focalnet [a-z]*mambaout [a-z]*senet [a-z]*byobnet mnasnet tresnet yolo[a-z]*
        u2?[-_]?net[a-z]* isnet rmbg deeplab[a-z]* fcn [a-z]*[-_]?cnn[a-z]* retinanet ssd(lite)? centernet textnet
        uvdoc[a-z_]* superpoint pp_ocrv[a-z0-9_]* [a-z0-9_]*hifigan convnet dcgan espnet rfdn[a-z]* efdn imdt?n
        faceboxes
        """,
    ),
    _rule("other", CONVNET, "encodec dac univnet slanet", stated_only=True),
    # --- Neither: tokens mixed by matrices, pooling, recurrence or state spaces; graphs.
    _rule(
        "other",
        OTHER,
        r"""
        [a-z]*mixer[a-z]* resmlp gmlp mlp sequencer2d poolformer(v2)? efficientvim vmamba vim mambavision [a-z]*lstm
        gru gcn gin gnn
        """,
    ),
    # --- Sound and time series.
    _rule(
        "other",
        TRANSFORMER,
        r"""
        wav2vec2[a-z-]* whisper hubert wavlm unispeech[a-z-]* audio-spectrogram-transformer data2vec[-_]audio
        musicgen[a-z_]* speecht5 seamless_m4t[a-z0-9_]* speech_to_text parakeet[a-z_]* moonshine[a-z_]* patchtst
        timesfm[a-z0-9_]* time_series_transformer decision_transformer
        """,
    ),
    _rule("other", TRANSFORMER, "sew sew-d clap[a-z_]* bark informer autoformer", stated_only=True),
    # --- Language models, with or without an encoder of images in front of them.
    _rule("language", OTHER, "rwkv [a-z_]*mamba recurrent_gemma xlstm"),
    _rule(
        "language",
        TRANSFORMER,
        r"""
        (al|distil|mobile|modern|camem|sci|bio|fin|legal|squeeze)?bert [a-z-]*roberta[a-z]* deberta[a-z]* electra
        xlnet minilm mpnet longformer layoutlm[a-z]* [a-z]*gpt[a-z_]* [a-z_]*llama[a-z_]*
        (mi(s|x)|minis|pix)tral[a-z]* qwen[a-z0-9_]* [a-z0-9]*gemma[a-z0-9_]* pythia olmo[a-z0-9_]* granite[a-z0-9_]*
        deepseek[a-z0-9_]* smollm stablelm starcoder codegen [a-z]*t5(gemma)?[a-z0-9_]* m?bart pegasus[a-z_]*
        opus[-_]mt nllb[a-z-]* m2m_100 marian llava[a-z_]* idefics[a-z0-9_]* blip[-_a-z0-9]* smolvlm[a-z_]*
        phi[-_]?\d[a-z_]* internlm chatglm florence2 paligemma esm
        """,
    ),
    _rule(
        "language",
        TRANSFORMER,
        r"""
        [a-z_-]*bert[a-z0-9_-]* gpt-sw3 data2vec-text git opt mpt led phi phimoe bloom falcon[a-z0-9_]* glm[a-z0-9_]*
        cohere[a-z0-9_]* ctrl funnel fnet reformer luke canine big_bird bigbird_pegasus rembert xlm[-_a-z]* xmod yoso
        nystromformer tapas roformer mvp mra fsmt prophetnet blenderbot[a-z-]* switch_transformers xglm persimmon
        jamba bamba zamba2? exaone[a-z0-9_]* helium nemotron[a-z0-9_]* hunyuan[a-z0-9_]* minimax[a-z0-9_]*
        kimi[a-z0-9_]* internvl kosmos[-_a-z0-9.]* fuyu janus chameleon emu3 mllama aya_vision aria udop donut
        pix2struct lilt bros markuplm vilt lxmert flava bridgetower align (?<!vision-)(?<!speech-)encoder-decoder rag
        dpr splinter ernie[a-z0-9_]* cpmant lfm[23][a-z_]* ovis2 molmo2[a-z_]* perception_lm
        [a-z0-9_]+_(vl|ocr)[a-z0-9_]* video_llava vipllava instructblip[a-z]* pop2piano gte
        """,
        stated_only=True,
    ),
    # --- A segmenter or detector that does not say its backbone nearly always has this one.
    _rule("swin", TRANSFORMER, "mask2former maskformer oneformer omdet-turbo"),
    _rule("beit", TRANSFORMER, "zoedepth"),
    _rule("vit", TRANSFORMER, "vision-encoder-decoder vision-text-dual-encoder"),
)
FAMILIES = (*dict.fromkeys(rule.family for rule in FAMILY_RULES if rule.family != "other"), "other", UNKNOWN)


def _data(pattern: str) -> re.Pattern:
    return re.compile(rf"(?<![a-z0-9])(?:{pattern})(?![a-z0-9])")


# Data set -> what it is called. Of several in one text ("in22k_ft_in1k", "vit-in21k-cifar10") the last one counts:
# names are written in the order of training.
DATA_RULES = {
    name: _data(pattern)
    for name, pattern in {
        "tiny-imagenet": r"tiny[-_ ]?imagenet([-_]?200)?",
        "imagenet-100": r"imagenet[-_ ]?100",
        "imagenette": r"imagenette\d*",
        "imagenet-21k": r"(imagenet|in|inw|pt|ft)[-_ ]?21k([-_]p)?|imagenet21k([-_]p)?",
        # `convnextv2-tiny-22k-384`, `22k-1k`, `22kto1k`: as Meta and Microsoft call theirs
        "imagenet-22k": r"(imagenet|in|pt|ft)[-_ ]?22k|convnext(v2)?[-_a-z\d]*[-_]22k",
        "imagenet-12k": r"(imagenet|in)[-_ ]?12k",
        "imagenet-1k": (
            r"(imagenet|in|ilsvrc)[-_ ]?(1k|1000|2012)|imagenet|ilsvrc|(convnext[-_a-z\d]*|22k)[-_]1k|22kto1k"
        ),
        "cifar100": r"cifar[-_ ]?100",
        "cifar10": r"cifar[-_ ]?10",
        "fashion-mnist": r"fashion[-_ ]?mnist|f[-_]?mnist",
        "mnist": r"mnist",
        "svhn": r"svhn",
        "stl10": r"stl[-_]?10",
        "eurosat": r"eurosat",
        "food101": r"food[-_ ]?101",
        "beans": r"beans",
        "cats-vs-dogs": r"cats?[-_ ](vs|and)[-_ ]dogs?",
        "oxford-iiit-pet": r"oxford[-_ ]?(iiit[-_ ])?pets?",
        "oxford-flowers": r"oxford[-_ ]?flowers[-_ ]?(102)?|flowers[-_ ]?102",
        "stanford-cars": r"stanford[-_ ]?cars",
        "stanford-dogs": r"stanford[-_ ]?dogs",
        "cub-200": r"cub[-_ ]?200([-_]2011)?",
        "caltech-101": r"caltech[-_ ]?101",
        "dtd": r"dtd",
        "gtsrb": r"gtsrb",
        "inaturalist": r"inaturalist\d*|inat\d*",
        "places365": r"places[-_ ]?365",
        "plantvillage": r"plant[-_ ]?village",
        "fer2013": r"fer[-_ ]?(2013|plus)",
        "rvl-cdip": r"rvl[-_ ]?cdip",
        "objects365": r"obj(ects)?[-_]?365",
        "coco": r"(ms)?[-_ ]?coco([-_ ]?(2014|2017|stuff|panoptic|instance|detection|\d+))?",
        "open-images": r"open[-_ ]?images([-_ ]?v\d)?",
        "pascal-voc": r"pascal[-_ ]voc([-_ ]?(2007|2012))?|voc[-_ ]?(2007|2012)",
        "ade20k": r"ade([-_ ]?20k)?",
        "cityscapes": r"cityscapes?",
        "sidewalk-semantic": r"sidewalk[-_ ]semantic|segments[-_ ]sidewalk",
        "nyu-depth": r"nyu([-_ ]?depth)?([-_ ]?v2)?",
        "kitti": r"kitti",
        "doclaynet": r"doclaynet",
        "publaynet": r"publaynet",
        "pubtables-1m": r"pubtables[-_ ]?1m",
        "cppe-5": r"cppe[-_ ]?5",
        "wider-face": r"wider[-_ ]?face",
        "laion": r"laion[-_ ]?(\d+[bm]|coco|aesthetics?|a)?([-_]en)?",
        "datacomp": r"datacomp(xl|[-_]?1b)?",
        "dfn": r"dfn\d+b|dfndr\db",
        "metaclip": r"metaclip2?(_[a-z0-9]+)?",
        "webli": r"(v2_)?webli",
        "yfcc": r"yfcc\d+m",
        "lvd-142m": r"lvd[-_]?142m",
        "lvd-1689m": r"lvd[-_]?1689m",
        "sat-493m": r"sat[-_]?493m",
        "sa-1b": r"sa[-_]?1b",
        "jft-300m": r"jft([-_]?300m)?",
        "wikitext": r"wikitext([-_]?(2|103))?",
        "bookcorpus": r"bookcorpus",
        "imdb": r"imdb",
        "squad": r"squad([-_]?v?2)?",
        "glue": r"glue|sst[-_]?2|mnli|qnli|mrpc",
        "common-voice": r"common[-_ ]voice[a-z0-9_]*",
        "librispeech": r"librispeech([-_]asr)?",
    }.items()
}
PRETRAINING_DATA = {"imagenet-21k", "imagenet-22k", "laion"}
# timm's tags that do not say their data: self-supervised training on ImageNet's images, and OpenAI's CLIP.
TIMM_TAGS = {**dict.fromkeys(("mae", "fcmae", "dino", "fb_dino"), "imagenet-1k"), "openai": "wit-400m"}
# What training scripts write where a user's own folder was the data.
NOT_DATA = {
    "imagefolder",
    "image_folder",
    "generator",
    "custom",
    "custom_dataset",
    "dataset",
    "none",
    "unknown",
    "arrow",
}
# The first labels of a classifier tell what it was trained on last.
LABEL_RULES = {
    "imagenet-1k": r"tench",
    "cifar10": r"(air)?plane, automobile, bird",
    "cifar100": r"apple, aquarium[ _]fish",
    "food101": r"apple[ _]pie, baby[ _]back[ _]ribs",
    "coco": r"(n/a, )?person, bicycle",
    "ade20k": r"wall, building, sky",
    "cityscapes": r"road, sidewalk, building",
    "eurosat": r"annual ?crop, forest",
    "beans": r"angular_leaf_spot",
}

# Suffix of the class of a transformers model -> task, as the Hub names it.
CLASS_TASKS = {
    "ForImageClassification": "image-classification",
    "ForImageClassificationWithTeacher": "image-classification",
    "ForSemanticSegmentation": "image-segmentation",
    "ForUniversalSegmentation": "image-segmentation",
    "ForInstanceSegmentation": "image-segmentation",
    "ForSegmentation": "image-segmentation",
    "ForObjectDetection": "object-detection",
    "ForDepthEstimation": "depth-estimation",
    "ForMaskedImageModeling": "image-feature-extraction",
    "ForVideoClassification": "video-classification",
    "ForKeypointDetection": "keypoint-detection",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
    "ForNextSentencePrediction": "text-classification",
    "ForAudioClassification": "audio-classification",
    "ForCTC": "automatic-speech-recognition",
    "ForSpeechSeq2Seq": "automatic-speech-recognition",
}
LANGUAGE_TASKS = {
    *("text-generation", "fill-mask", "text-classification", "token-classification", "question-answering"),
    *("summarization", "translation", "sentence-similarity", "text2text-generation", "multiple-choice"),
}
TASKS = {
    *CLASS_TASKS.values(),
    *LANGUAGE_TASKS,
    *(
        "image-to-image",
        "image-to-text",
        "mask-generation",
        "zero-shot-image-classification",
        "zero-shot-object-detection",
    ),
    *(
        "image-text-to-text",
        "text-to-image",
        "feature-extraction",
        "reinforcement-learning",
        "visual-question-answering",
    ),
}
