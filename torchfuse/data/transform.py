"""The transform of samples: conversations with images become token ids, labels and pixels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torchfuse.data.collate import unnamed
from torchfuse.data.documents import ImageLayout
from torchfuse.data.encoder_items import UNNAMED, ItemFormats, Items, options_of_model
from torchfuse.data.features import FeatureReader
from torchfuse.data.images import ImageTransform
from torchfuse.data.masks import ImageScope
from torchfuse.data.media import MediaInput, MediaTransform, stack_images
from torchfuse.data.media_reader import MediaCache, MediaReader
from torchfuse.data.readers.torchtune_messages import sample_from_torchtune
from torchfuse.data.samples import Media, Message, Sample
from torchfuse.data.sequences import IGNORED, SequenceEncoder
from torchfuse.data.templates import ChatTemplate, last_answer
from torchfuse.errors import ConfigError, DataError, FusionError
from torchfuse.naming import find_model, unwrap

__all__ = ["SampleTransform"]


class SampleTransform:
    """Transform of samples to tokens, labels, pixels and the mask between them.

    It takes the place of the tokenizer in a torchtune recipe. ``for_model`` makes the one that fits a
    fused model.

    Args:
        tokenizer: directory of the language model, with its ``tokenizer.json``.
        image_transform: directory of the encoder, with its image processor, or an ``ImageTransform``;
            None where there are no images.
        image_token: id of an image in the sequence; usually the first one after the pretrained
            vocabulary, for which ``fuse(..., fusion_vocab_size=1)`` adds a row. None only for
            ``layout="prefix"``. By name for encoders with placeholders of their own.
        features_per_image: features of an image, or of each of its tiles or frames, after encoder and
            adapter. By name for named encoders; of several, each takes the modality of its name.
        template: the template of conversations: a name (``"llama3"``, ``"chatml"``, ``"vicuna"``,
            ``"plain"``) or a ``.jinja`` file. None: the tokenizer's own, ``"plain"`` if it has none.
        layout: the tokens of an image in the sequence. ``"marker"``: one ``image_token`` (for
            cross-attention); ``"placeholder"``: one for each feature; ``"prefix"``: none.
        scope: which images a token may attend to, see ``image_mask``; with ``"marker"``.
        max_seq_len: the longest sequence, with features that come in front of it; a longer one is an
            error, never truncated.
        cache_images: how many images' pixels to keep in memory.
        media_transforms: transforms of other modalities, such as ``video``, see ``MediaReader``.

    Raises:
        ConfigError: if options contradict each other, the template cannot be used, or none of the media
            are for one of several encoders.
        CheckpointError: if a directory lacks its file.
    """

    def __init__(
        self,
        tokenizer: str | Path,
        *,
        image_transform: str | Path | ImageTransform | None,
        image_token: int | Mapping[str, int] | None,
        features_per_image: int | Mapping[str, int],
        template: str | Path | ChatTemplate | None = None,
        layout: ImageLayout = "marker",
        scope: ImageScope = "last",
        max_seq_len: int | None = None,
        cache_images: int = 0,
        media_transforms: Mapping[str, MediaTransform | Mapping[str, Any] | str] | None = None,
    ) -> None:
        self.image_token, self.features_per_image = image_token, features_per_image
        self.formats = ItemFormats(image_token, features_per_image)
        self._folder, self.layout, self._scope = tokenizer, layout, scope
        self.max_seq_len = max_seq_len
        self._set_template(template)
        self.reader: MediaReader | FeatureReader = MediaReader(image_transform, media_transforms)
        self.image_transform = self.reader.image_transform
        self.formats.check_modalities(self.reader.modalities)
        self._cache = MediaCache(cache_images)

    def _set_template(self, template: str | Path | ChatTemplate | None) -> None:
        self.template = ChatTemplate.load(template, self._folder)
        self._sequences = SequenceEncoder(
            self._folder,
            self.template,
            formats=self.formats,
            layout=self.layout,
            scope=self._scope,
        )
        self.tokenizer = self._sequences.tokenizer

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        tokenizer: str | Path,
        image_transform: str | Path | ImageTransform | None,
        template: str | Path | ChatTemplate | None = None,
        max_seq_len: int | None = None,
        **options: Any,
    ) -> SampleTransform:
        """Make the transform that fits a fused model: ids, features and lengths are the model's.

        Args:
            model: a fused model. Of several encoders, each is named as the modality that it encodes.
            tokenizer: directory of its language model.
            image_transform: directory of its encoder, or a transform.
            template: as for the class.
            max_seq_len: the longest sequence; None: the model's own.
            **options: other arguments of the class. Those that the model determines must agree with it;
                ``features_per_image`` may be one number for named encoders where the model has none.

        Raises:
            ConfigError: if the model has no token for images, if the number of features of an image is
                unknown, if ``max_seq_len`` is more than the model's, or naming each option that does not
                fit the model.
        """
        owner: Any = unwrap(find_model(model))
        given = options_of_model(vars(owner.image_format()), options)
        length = owner.max_seq_len if max_seq_len is None else max_seq_len
        if length > owner.max_seq_len:
            raise ConfigError(
                f"max_seq_len is {length}, and the model's is {owner.max_seq_len}: give at most that."
            )
        return cls(
            tokenizer, image_transform=image_transform, template=template, max_seq_len=length, **given
        )

    def with_template(self, template: str | Path | ChatTemplate | None) -> SampleTransform:
        """Return a copy that writes conversations by another template.

        Args:
            template: as for the class.

        Raises:
            ConfigError: if the template cannot be used.
        """
        other = copy(self)
        other._set_template(template)
        return other

    def with_reader(self, reader: MediaReader | FeatureReader) -> SampleTransform:
        """Return a copy that reads media otherwise, for example their features in place of pixels."""
        other = copy(self)
        other.reader, other._cache = reader, copy(self._cache)
        return other

    @property
    def pad_id(self) -> int:
        """Id that pads sequences."""
        return self.tokenizer.pad_id

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Ids that end an answer: the template's end of a turn, and the model's ends of a text."""
        return self._sequences.stop_tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens up to the first stop token, without images."""
        return self._sequences.decode(tokens)

    def __call__(
        self, sample: Sample | Mapping[str, Any], *, with_answer: bool = True, inference: bool = False
    ) -> dict[str, Any]:
        """Encode a sample.

        Args:
            sample: a conversation; or a mapping with ``messages``, as torchtune's datasets and recipes
                pass it.
            with_answer: whether the whole conversation is encoded, with labels. False: its
                ``sample.prompt`` up to where the answer begins.
            inference: torchtune's keyword: the opposite of ``with_answer``.

        Returns:
            ``tokens`` (list), ``images`` (``[m, 3, h, w]``, or a list of ``MediaInput`` where an image
            is more than one tensor) and ``encoder_mask`` (bool ``[s, n]``, over the features of all
            images), both by name for named encoders. With the answer also ``labels`` (list, unshifted,
            -100 where nothing is learned) and, if weights of messages are other than 0 and 1,
            ``loss_weights`` (list). For a mapping also torchtune's ``mask``, True where nothing is
            learned.

        Raises:
            DataError: if the sample has nothing to learn or is too long, or an image cannot be read or
                no encoder takes its modality.
            ConfigError: if the template cannot be used for it.
        """
        with_answer = with_answer and not inference
        if isinstance(sample, Mapping):
            result = self(sample_from_torchtune(sample), with_answer=with_answer)
            labels = result.get("labels", [IGNORED] * len(result["tokens"]))
            return {**result, "mask": [label == IGNORED for label in labels]}
        messages = sample.messages if with_answer else sample.prompt
        inputs = self._read_media(sample, messages)
        media = [each for message in messages for each in message.media]
        items: list[Items] = []
        images: dict[str, list[MediaInput]] = {name: [] for name in self.formats.by_encoder}
        for each, given in zip(media, inputs, strict=True):
            items.append(Items(self.formats.encoder_of(each.modality), given.num_items))
            images[items[-1].encoder].append(given)
        result = self._encode(sample, items, with_answer=with_answer)
        pixels = self.image_transform
        size = None if pixels is None else (pixels.height, pixels.width)
        result["images"] = unnamed({name: stack_images(given, size) for name, given in images.items()})
        result["encoder_mask"] = self.encoder_mask(result["tokens"], items)
        return result

    def length(self, sample: Sample, *, with_answer: bool = True) -> int:
        """Return the positions of the decoder that a sample takes, without decoding its images.

        Args:
            sample: a conversation.
            with_answer: as for a call.

        Raises:
            DataError: as for a call.
        """
        items = self.items(sample.messages if with_answer else sample.prompt)
        tokens = self._encode(sample, items, with_answer=with_answer)["tokens"]
        return self._sequences.length(tokens, items)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a conversation up to where the next answer begins.

        Raises:
            DataError: if the template refuses the conversation, or an image cannot be read.
        """
        return self._sequences.prompt(messages, self.items(messages))

    def next_turn(self, messages: Sequence[Message], *, ended: bool = True) -> list[int]:
        """Return the ids of a later turn, for caches that hold the conversation up to the last answer.

        After the ids of the earlier turns and answers they are those of ``prompt``.

        Args:
            messages: the whole conversation, with a new question at its end.
            ended: whether the last answer ended with a stop token. Otherwise it was cut short, and the
                ids begin with the end of its turn.

        Raises:
            DataError: if the template refuses the conversation, or an image cannot be read.
            ConfigError: if the template writes earlier turns otherwise than before.
        """
        new = messages[last_answer(messages) + 1 :]
        return self._sequences.next_turn(messages, self.items(new), ended=ended)

    def media_input(self, media: Media) -> MediaInput:
        """Return an image as the encoder takes it.

        Raises:
            DataError: if it cannot be read.
        """
        return self._cache.get(media, self.reader)

    def items(self, messages: Iterable[Message]) -> list[Items]:
        """Return the items of all media in messages, without decoding images.

        Raises:
            DataError: if an image cannot be read, or no encoder takes its modality.
        """
        return [
            Items(self.formats.encoder_of(media.modality), self.reader.num_items(media))
            for message in messages
            for media in message.media
        ]

    def encoder_mask(
        self, tokens: Sequence[int], items: int | Sequence[int] | Sequence[Items]
    ) -> Tensor | dict[str, Tensor]:
        """Return which features each token may attend to, bool ``[s, n]``, True: may attend.

        Args:
            tokens: a whole sequence.
            items: of its images; for an encoder without a name also the number of images, or of the
                items of each.

        Returns:
            The mask; by name for named encoders.
        """
        each = [1] * items if isinstance(items, int) else items
        named = [Items(UNNAMED, one) if isinstance(one, int) else one for one in each]
        mask: Tensor | dict[str, Tensor] = unnamed(self._sequences.encoder_mask(tokens, named))
        return mask

    def _read_media(self, sample: Sample, messages: Sequence[Message]) -> list[MediaInput]:
        try:
            return [self.media_input(media) for message in messages for media in message.media]
        except DataError as error:
            raise DataError(f"{sample.origin or 'The sample'}: {error}") from error

    def _encode(
        self, sample: Sample, items: Sequence[Items], *, with_answer: bool = True
    ) -> dict[str, Any]:
        """Return tokens and, with the answer, labels and weights."""
        what = sample.origin or "The sample"
        if with_answer and all(message.role != "assistant" for message in sample.messages):
            raise DataError(f"{what} has no answer.")
        try:
            if with_answer:
                result = self._sequences.encode(sample.messages, items)
            else:
                result = {"tokens": self._sequences.prompt(sample.prompt, items)}
        except FusionError as error:
            raise type(error)(f"{what}: {str(error).rstrip('.')}.") from error
        if with_answer and all(label == IGNORED for label in result["labels"]):
            raise DataError(
                f"{what} has nothing to learn: all its answers are empty or have the weight 0."
            )
        length = self._sequences.length(result["tokens"], items)
        if self.max_seq_len is not None and length > self.max_seq_len:
            raise DataError(
                f"{what} is {length} tokens long{' with its answer' if with_answer else ''}, and "
                f"max_seq_len is {self.max_seq_len}."
            )
        return result
