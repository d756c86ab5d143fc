"""The old place of `deploy.artifacts.files`' licences."""

from deploy.artifacts.files import copy_licenses as copy_licenses
from deploy.artifacts.files import license_files as license_files
