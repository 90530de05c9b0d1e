//! The addresses a guest sends from: the MAC address of its card or any other it has chosen, with
//! the VLAN tags the frame carried (IEEE 802.1Q). When the guest moves to another port of the
//! network, each of them has to be announced.
//!
//! Bounded: the [`NET_SOURCES_MAX`] that were used last are kept. A table is a function of the
//! frames transmitted, so two hosts that execute the same guest have the same one.

use serde::{Deserialize, Serialize};

use crate::state::InvalidState;

/// Most addresses that are remembered.
pub const NET_SOURCES_MAX: usize = 256;
/// Most VLAN tags of a frame that are looked at: a service tag and a customer tag (IEEE 802.1ad).
pub const VLAN_TAGS_MAX: usize = 2;

const SOURCE_OFFSET: usize = 6;
const TYPE_OFFSET: usize = 12;
const TAG_BYTES: usize = 4;
/// The tag's lowest bits name the VLAN; those above are its priority.
const VLAN_ID_MASK: u16 = 0x0fff;
/// Group bit: an address with it cannot be a source (IEEE 802.3, §3.2.3).
const GROUP: u8 = 1;

/// What kind of VLAN a tag names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VlanKind {
    /// IEEE 802.1Q, Ethernet type 0x8100.
    Customer,
    /// IEEE 802.1ad, Ethernet type 0x88a8.
    Service,
}

impl VlanKind {
    fn of_type(ethernet_type: u16) -> Option<Self> {
        let kinds = [VlanKind::Customer, VlanKind::Service];
        kinds.into_iter().find(|kind| kind.ethernet_type() == ethernet_type)
    }

    /// The Ethernet type that says so.
    pub fn ethernet_type(self) -> u16 {
        match self {
            VlanKind::Customer => 0x8100,
            VlanKind::Service => 0x88a8,
        }
    }
}

/// A VLAN tag without its priority.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VlanTag {
    /// Which kind.
    pub kind: VlanKind,
    /// Number of the VLAN, 0 to 4095.
    pub id: u16,
}

/// Where frames of the guest come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetSource {
    /// The address.
    pub mac: [u8; 6],
    /// The tags behind it, the outermost first.
    pub tags: [Option<VlanTag>; VLAN_TAGS_MAX],
}

impl NetSource {
    /// An address without a tag.
    pub fn untagged(mac: [u8; 6]) -> Self {
        NetSource { mac, tags: [None; VLAN_TAGS_MAX] }
    }

    /// Where an Ethernet frame comes from; `None` for one that is too short or comes from no single
    /// station.
    pub fn of_frame(frame: &[u8]) -> Option<Self> {
        let mac: [u8; 6] = frame.get(SOURCE_OFFSET..TYPE_OFFSET)?.try_into().ok()?;
        let mut source = NetSource::untagged(mac);
        if !source.is_station() {
            return None;
        }
        let word = |at: usize| Some(u16::from_be_bytes([*frame.get(at)?, *frame.get(at + 1)?]));
        for (index, tag) in source.tags.iter_mut().enumerate() {
            let at = TYPE_OFFSET + index * TAG_BYTES;
            let Some(kind) = word(at).and_then(VlanKind::of_type) else { break };
            *tag = word(at + 2).map(|control| VlanTag { kind, id: control & VLAN_ID_MASK });
        }
        Some(source)
    }

    fn is_station(&self) -> bool {
        self.mac[0] & GROUP == 0 && self.mac != [0; 6]
    }

    fn is_valid(&self) -> bool {
        let [outer, inner] = &self.tags;
        let known = self.tags.iter().flatten().all(|tag| tag.id <= VLAN_ID_MASK);
        known && self.is_station() && (outer.is_some() || inner.is_none())
    }
}

/// The addresses a guest has sent from, the one used last first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<NetSource>", into = "Vec<NetSource>")]
pub struct NetSources(Vec<NetSource>);

impl NetSources {
    /// A frame was transmitted. The address that was not used for longest gives way to a new one.
    pub(crate) fn learn(&mut self, frame: &[u8]) {
        let Some(source) = NetSource::of_frame(frame) else { return };
        if let Some(index) = self.0.iter().position(|known| *known == source) {
            return self.0[..=index].rotate_right(1);
        }
        self.0.truncate(NET_SOURCES_MAX - 1);
        self.0.insert(0, source);
    }

    /// The addresses, the one used last first.
    pub fn iter(&self) -> impl Iterator<Item = &NetSource> {
        self.0.iter()
    }

    /// Whether the guest sends from `mac`, with any tag or none.
    pub fn has_mac(&self, mac: &[u8]) -> bool {
        self.0.iter().any(|source| source.mac == *mac)
    }
}

impl From<NetSources> for Vec<NetSource> {
    fn from(sources: NetSources) -> Self {
        sources.0
    }
}

impl TryFrom<Vec<NetSource>> for NetSources {
    type Error = InvalidState;

    fn try_from(sources: Vec<NetSource>) -> Result<Self, InvalidState> {
        InvalidState::check(sources.len() <= NET_SOURCES_MAX, "net_sources")?;
        for (index, source) in sources.iter().enumerate() {
            let is_new = !sources[..index].contains(source);
            InvalidState::check(is_new && source.is_valid(), "net_sources.source")?;
        }
        Ok(NetSources(sources))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

    fn frame(mac: [u8; 6], after: &[u8]) -> Vec<u8> {
        [&[0xff; 6][..], &mac, after].concat()
    }

    fn tag(kind: VlanKind, id: u16) -> Option<VlanTag> {
        Some(VlanTag { kind, id })
    }

    #[test]
    fn a_frame_names_its_source_and_its_tags_without_their_priority() {
        use VlanKind::{Customer, Service};
        for (after, tags) in [
            (&[8, 0, 0x45, 0][..], [None, None]),
            (&[0x81, 0, 0xa0, 5, 8, 0], [tag(Customer, 5), None]),
            (
                &[0x88, 0xa8, 0x0f, 0xff, 0x81, 0, 0, 7, 8, 0],
                [tag(Service, 4095), tag(Customer, 7)],
            ),
            (&[0x81, 0, 0, 1, 0x81, 0, 0, 2, 0x81, 0, 0, 3], [tag(Customer, 1), tag(Customer, 2)]),
            // Cut in a tag: as far as it goes.
            (&[0x81, 0, 0], [None, None]),
            (&[], [None, None]),
        ] {
            let source = NetSource::of_frame(&frame(MAC, after));
            assert_eq!(source, Some(NetSource { mac: MAC, tags }), "{after:x?}");
        }
    }

    #[test]
    fn no_station_is_no_source() {
        for mac in [[0xff; 6], [1, 0, 0x5e, 0, 0, 1], [0; 6]] {
            assert_eq!(NetSource::of_frame(&frame(mac, &[8, 0])), None);
        }
        assert_eq!(NetSource::of_frame(&[0; 11]), None);
    }

    #[test]
    fn the_address_unused_for_longest_gives_way() {
        let mac = |n: usize| [2, 0, 0, 0, (n >> 8) as u8, n as u8];
        let mut sources = NetSources::default();
        for n in 0..NET_SOURCES_MAX {
            sources.learn(&frame(mac(n), &[8, 0]));
        }
        sources.learn(&frame(mac(0), &[8, 0]));
        sources.learn(&frame(mac(0), &[0x81, 0, 0, 1]));
        assert_eq!(sources.iter().count(), NET_SOURCES_MAX);
        assert!(sources.has_mac(&mac(0)) && sources.has_mac(&mac(2)));
        assert!(!sources.has_mac(&mac(1)));
        assert_eq!(sources.iter().filter(|source| source.mac == mac(0)).count(), 2);
    }

    #[test]
    fn tables_that_cannot_be_are_refused() {
        let source = NetSource::untagged(MAC);
        let tagged = |tags| NetSource { tags, ..source };
        let one = tag(VlanKind::Customer, 1);
        assert!(
            NetSources::try_from(vec![source, tagged([one, None]), tagged([one, one])]).is_ok()
        );
        for wrong in [
            vec![source, source],
            vec![NetSource::untagged([1; 6])],
            vec![tagged([None, one])],
            vec![tagged([tag(VlanKind::Service, 4096), None])],
            (0..=NET_SOURCES_MAX)
                .map(|n| NetSource::untagged([2, 0, 0, 0, (n >> 8) as u8, n as u8]))
                .collect(),
        ] {
            assert!(NetSources::try_from(wrong).is_err());
        }
    }
}
