//! Amounts as Kubernetes writes them.

use super::FineTuneJobSpec;

const GIB: f64 = 1024.0 * 1024.0 * 1024.0;

impl FineTuneJobSpec {
    /// Returns the user's limit of a training pod's memory, in bytes, if there is one that can be read.
    pub fn memory_limit(&self) -> Option<u64> {
        bytes(self.resources.as_ref()?.limits.as_ref()?.get("memory")?)
    }
}

/// Reads an amount of bytes.
///
/// # Source
/// `Quantity` of apimachinery/pkg/api/resource.
fn bytes(quantity: &str) -> Option<u64> {
    let end = quantity.find(|character: char| !matches!(character, '0'..='9' | '.'));
    let (number, unit) = quantity.split_at(end.unwrap_or(quantity.len()));
    let factor = match unit {
        "" => 1.0,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "T" => 1e12,
        "Ki" => 1024.0,
        "Mi" => 1024.0 * 1024.0,
        "Gi" => GIB,
        "Ti" => 1024.0 * GIB,
        _ => return None,
    };
    Some((number.parse::<f64>().ok()? * factor) as u64)
}

#[cfg(test)]
mod tests {
    use super::bytes;

    #[test]
    fn reads_what_kubernetes_writes() {
        for (quantity, expected) in [
            ("1500M", Some(1_500_000_000)),
            ("1.5Gi", Some(3 << 29)),
            ("512Mi", Some(512 << 20)),
            ("1024", Some(1024)),
            ("many", None),
        ] {
            assert_eq!(bytes(quantity), expected, "{quantity}");
        }
    }
}
