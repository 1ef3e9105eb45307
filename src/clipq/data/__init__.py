"""Data sets by name, of picture files or from the user's own function, and minibatches of them.

data = load_data("cifar10", root="data")
for inputs, targets in data.batches("train", batch_size=128, seed=0, epoch=3):
    ...
"""

from clipq.data.batches import Batch, Batches, ImageSamples, Samples
from clipq.data.described import PictureData
from clipq.data.images import CropAndFlip, Images, ImageSet, Normalisation, check_labels
from clipq.data.named import DATA_SETS, load_images
from clipq.data.pictures import PictureSamples
from clipq.data.sources import Data, load_data, split_images
from clipq.data.split import stratified_split
from clipq.data.user import UserSamples

__all__ = [
    "DATA_SETS",
    "Batch",
    "Batches",
    "CropAndFlip",
    "Data",
    "ImageSamples",
    "ImageSet",
    "Images",
    "Normalisation",
    "PictureData",
    "PictureSamples",
    "Samples",
    "UserSamples",
    "check_labels",
    "load_data",
    "load_images",
    "split_images",
    "stratified_split",
]
