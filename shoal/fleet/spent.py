"""What a device has spent: updates of which it has revealed shares, and which it never offers again (docs/trust.md).

An update is known by what makes its numbers (`plan.secure.update_of`), as training again gives the same ones; not by any number of the server's. It is written down before the shares leave the device.
"""

from dataclasses import dataclass

from shoal.fleet.device_file import DeviceFile


@dataclass(frozen=True)
class SpentUpdates:
    """Those of one device."""

    file: DeviceFile
    device: str

    def __contains__(self, update: bytes) -> bool:
        return self.file.is_spent(self.device, update)

    def add(self, update: bytes) -> None:
        """Writes it down for good. Raises StoreError: it could not be; nothing may be revealed then."""
        self.file.spend(self.device, update)
